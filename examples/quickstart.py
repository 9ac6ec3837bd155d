"""The first search: bring a sample of a two-dimensional mixture near to a rare mode, and compare with plain sampling.

    python examples/quickstart.py [FOLDER]        writes a run folder into FOLDER (default: runs)
"""

import sys

import tsdiff

result = tsdiff.search(
    "gaussian",  # an analytic model: no weights, no download
    "near (3, 2.4)",  # the only prompts it understands name a point
    policy="beam",
    verifier="gaussian-target",
    nfe=400,  # network evaluations that the search may spend
    out=sys.argv[1] if len(sys.argv) > 1 else "runs",
)
print(f"searched    {result.score:9.4f}   {result.ledger.nfe} NFE, {len(result.tree.nodes)} nodes")
print(f"one sample  {result.first_score:9.4f}   {result.baseline_ledger.nfe} NFE, the same first noise")
print(f"path        {' '.join(f'{node.move.kind}:{node.level}' for node in result.node.path())}")
print(f"saved in    {result.path}")
