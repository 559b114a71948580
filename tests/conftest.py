"""One thread for every process of the tests.

Workers of pytest-xdist, and what they start, would each take all cores for networks that are too small for a second
thread: on two cores the suite then takes twice as long. It must be said before torch and numpy are imported.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
