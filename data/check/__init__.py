"""Check every image before a long job reads it.

    python -m data.check --data PATH --report report.json --list bad.txt
    python -m data.check --train-dir T --val-dir V ...
    python -m data.check --data-dir DIR ...

The tool decodes every file as training would. It reports files that are empty, truncated or
otherwise unreadable, and files that are readable but unusual (CMYK, other formats under a JPEG's
name, corrupt EXIF). It also reports whether train and val hold the same classes, and how the counts
compare with ImageNet's. For records it verifies checksums, index files, labels and the order of
classes as well, and that the files match the manifest: none missing, changed, duplicated or
unexpected. It names what does not count: hidden files, folders of tools and files that are not
images. ``bad.txt`` lists the unreadable images for ``--exclude`` of the training scripts. A record
with a wrong label is not in the list, because it is a fault of the whole set.
"""
