"""pqn_minatar.py with its binary planes divided by 255, as PureJaxQL has them: what does it cost or gain?

    python benchmarks/curves.py --name minatar_divided --curves "planes=pqn_minatar --total-timesteps 1e6" \\
        --peer "planes / 255=python benchmarks/divided_planes.py --num-seeds 10 --total-timesteps 1000000"

Takes the flags of pqn_minatar.py; its last line is JSON with global_step [n] and greedy returns [num_seeds, n].
"""

import json
import sys
import tempfile

from curves import read_returns
from machine import ROOT

sys.path.insert(0, str(ROOT))
import pqn_minatar


class DividedQNetwork(pqn_minatar.QNetwork):
    """The network on planes of 0 and 1 / 255."""

    def __call__(self, x, train=False):
        return super().__call__(x / 255, train)


pqn_minatar.QNetwork = DividedQNetwork
with tempfile.TemporaryDirectory() as folder:
    run_dir = pqn_minatar.main(pqn_minatar.parse_args([*sys.argv[1:], "--runs-dir", folder]))
    steps, returns = read_returns(run_dir, "eval/episodic_return")
print(json.dumps({"global_step": steps.tolist(), "returns": returns.tolist()}))
