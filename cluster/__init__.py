"""Where things run and live: Ray session, runners, storage, shard formats, progress, fault policy."""

import os

# Read by OpenMP when torch is loaded, here and in the workers, which inherit it. Waiting threads sleep instead of
# spinning: where other processes want the CPUs too, spinning ones make small networks a hundred times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
