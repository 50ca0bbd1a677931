"""`python -m mmkernels.train.data.spoken_digits FOLDER`: makes the files anew."""

import sys

from . import make

if len(sys.argv) != 2:
    sys.exit("usage: python -m mmkernels.train.data.spoken_digits FOLDER")
make(sys.argv[1])
