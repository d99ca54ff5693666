"""A disk without space, simulated: what replaces a function that writes."""

import errno
import os


def full_disk(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
