"""Convert image folders to shuffled TFRecords with index files, for DALI and for ``--records``.

    python -m data.make_tfrecords --train-dir T --val-dir V --data-dir OUT
    mpirun -np 9 python -m data.make_tfrecords ...     (rank 0 distributes, 8 ranks write)
    python -m data.make_tfrecords --from-tfrecords --data-dir DIR

This writes OUT/train/train-00000-of-01024, OUT/validation/validation-00000-of-00040, their index
files under OUT/idx_files, and OUT/manifest.json: classes, counts, and size and SHA-256 of every
shard. The third form reads existing records (such as TensorFlow's ImageNet), verifies every
checksum, and writes the index files and the manifest.

The bytes do not depend on the number of workers. A shard appears complete or not at all. To continue
after an interruption, or to write files that were lost since, run the same command again. The tool
refuses to continue with other flags, or with images whose names or sizes have changed.
"""
