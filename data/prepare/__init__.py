"""Prepare images for training: unpack archives, convert large files, and say what that gains.

    python -m data.prepare --train-tar ILSVRC2012_img_train.tar --train-dir OUT/train
    python -m data.prepare --val-tar ILSVRC2012_img_val.tar --devkit ILSVRC2012_devkit_t12.tar.gz \\
        --val-dir OUT/val
    python -m data.prepare --data PATH
    python -m data.prepare --data PATH --out NEW

The first two commands unpack ILSVRC2012's published archives into one folder per class. The files
are at https://image-net.org/download-images (an account is needed). The tar of training images
contains one tar per class. The validation images are not sorted into classes; the development kit
gives their classes in ``data/ILSVRC2012_validation_ground_truth.txt`` and ``data/meta.mat``. Instead
of the kit, ``--val-classes FILE`` takes one line ``<image file> <class>`` per image. The archives may
be compressed (gzip, bzip2, xz): training images are unpacked in one pass, and the tar of validation
images is unpacked to a temporary file first. A class folder appears complete or not at all. The tool
refuses a folder of validation images that were sorted by another list.

The third command prints the layout of the images at PATH, makes their index if they need one, measures
how fast they are read as they are and as TFRecords, and prints the cost of a conversion. The fourth
command also converts. Compressed tars and records are unpacked into plain ones, and everything else becomes
TFRecords with index files and a manifest.

To continue after an interruption, run the same command again.
"""
