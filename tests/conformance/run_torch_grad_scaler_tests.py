"""Run PyTorch's own tests of GradScaler with ours in the place of torch's.

    python tests/conformance/run_torch_grad_scaler_tests.py PATH/TO/pytorch/test/test_torch.py

PyTorch's tests are not part of this repository: PATH (or $TORCH_TEST_FILE) names a copy whose
version fits the torch that is installed. `torch.amp.GradScaler` and `torch.GradScaler` are replaced
before that file is loaded. Needs what its imports need: numpy, expecttest, hypothesis.
`--baseline` leaves torch's own in place; `--autocast` replaces `torch.autocast` as well.
The exit code is 1 when a test ends otherwise than `EXPECTED_TO_DIFFER` says.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import sys
import unittest
from pathlib import Path

import torch
import torch.testing._internal.common_device_type as device_type_tests

import narrowcast

GROUP = re.compile(r"grad_scal|gradscaler|params_invalidated")
# These assert that gradients broken between `unscale_` and `step` do reach the weights. Ours looks
# again and skips such a step, so the weights stay finite: that is the difference we want.
EXPECTED_TO_DIFFER = re.compile(r"test_params_invalidated_with_grads_invalidated")


def load(path: Path, device: str) -> type[unittest.TestCase]:
    """Execute the file and return its device tests for this device, the only ones instantiated."""
    instantiate = device_type_tests.instantiate_device_type_tests
    made: dict[str, object] = {}

    def only_ours(template: type, scope: dict[str, object], **_: object) -> None:
        if template.__name__ == "TestTorchDeviceType":
            instantiate(template, scope, only_for=(device,))
            made.update(scope)

    device_type_tests.instantiate_device_type_tests = only_ours
    spec = importlib.util.spec_from_file_location("torchs_own_tests", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return made[f"TestTorchDeviceType{device.upper()}"]  # type: ignore[return-value]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", nargs="?", default=os.environ.get("TORCH_TEST_FILE"))
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--baseline", action="store_true", help="test torch's own GradScaler")
    parser.add_argument("--autocast", action="store_true", help="replace torch.autocast as well")
    options = parser.parse_args()
    if options.path is None:
        parser.error("give the path of PyTorch's test/test_torch.py, or set TORCH_TEST_FILE")
    if not options.baseline:
        torch.GradScaler = torch.amp.GradScaler = narrowcast.GradScaler  # type: ignore[misc]
    if options.autocast:
        torch.autocast = torch.amp.autocast = narrowcast.autocast  # type: ignore[misc]

    tests = load(Path(options.path), options.device)
    names = [n for n in unittest.TestLoader().getTestCaseNames(tests) if GROUP.search(n)]
    result = unittest.TestResult()
    unittest.TestSuite(tests(name) for name in names).run(result)

    ended = dict.fromkeys(names, "passed")
    for test, _ in result.skipped:
        ended[test._testMethodName] = "skipped"
    for test, trace in [*result.failures, *result.errors]:
        ended[test._testMethodName] = "failed"
        if options.baseline or not EXPECTED_TO_DIFFER.search(test._testMethodName):
            print(f"{test._testMethodName}\n{trace}")
    for name, end in ended.items():
        if not options.baseline and EXPECTED_TO_DIFFER.search(name):
            ended[name] = "differs on purpose" if end == "failed" else "failed to differ"
        print(f"{ended[name]:18}  {name}")
    unexpected = [name for name, end in ended.items() if end.startswith("failed")]
    ends = list(ended.values())
    counts = ", ".join(f"{ends.count(e)} {e}" for e in sorted(set(ends)))
    whose = "torch's" if options.baseline else "narrowcast's"
    print(
        f"\n{whose} GradScaler, torch {torch.__version__}: {counts}; unexpected: {len(unexpected)}"
    )
    return int(bool(unexpected))


if __name__ == "__main__":
    sys.exit(main())
