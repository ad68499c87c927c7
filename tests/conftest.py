"""One thread for each test: several run side by side, and threads that wait for each other would slow all of them."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
