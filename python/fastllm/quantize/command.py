"""`fastllm quantize`: its flags, and what it says at the end."""

from __future__ import annotations

import argparse
import sys

from fastllm.quantize.config import BITS, GROUP_SIZES, METHODS, QuantizeConfig
from fastllm.quantize.run import quantize

_DEFAULTS = QuantizeConfig()


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="folder of safetensors or hub id, 16 or 32 bits")
    parser.add_argument("out", metavar="OUT", help="folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace the model that OUT holds")
    how = parser.add_argument_group("quantization")
    how.add_argument("--method", choices=METHODS, default=_DEFAULTS.method, help="(default: %(default)s)")
    how.add_argument(
        "--bits", type=int, choices=BITS, default=_DEFAULTS.bits, help="of a weight (default: %(default)s)"
    )
    how.add_argument(
        "--group-size",
        type=int,
        choices=GROUP_SIZES,
        default=_DEFAULTS.group_size,
        help="inputs that share a scale, -1: all; must divide every layer's inputs (default: %(default)s)",
    )
    how.add_argument("--desc-act", action="store_true", help="GPTQ: inputs by falling activation; better and slower")
    how.add_argument(
        "--sym",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="GPTQ: scales alone, or zero points too (default: --sym)",
    )
    how.add_argument(
        "--damp-percent",
        type=float,
        metavar="SHARE",
        default=_DEFAULTS.damp_percent,
        help="GPTQ: of the Hessian's mean diagonal that is added to it (default: %(default)s)",
    )
    text = parser.add_argument_group("calibration")
    text.add_argument("--calibration", metavar="FILE|TEXT", help="default: the English documentation in Python itself")
    text.add_argument(
        "--calibration-samples", type=int, metavar="N", default=_DEFAULTS.num_samples, help="(default: %(default)s)"
    )
    text.add_argument(
        "--calibration-length",
        type=int,
        metavar="TOKENS",
        default=_DEFAULTS.sample_length,
        help="of a sample (default: %(default)s)",
    )
    text.add_argument(
        "--seed", type=int, default=_DEFAULTS.seed, help="of the choice of samples (default: %(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    config = QuantizeConfig(
        method=args.method,
        bits=args.bits,
        group_size=args.group_size,
        desc_act=args.desc_act,
        sym=args.sym,
        damp_percent=args.damp_percent,
        calibration=args.calibration,
        num_samples=args.calibration_samples,
        sample_length=args.calibration_length,
        seed=args.seed,
    )
    report = quantize(args.model, args.out, config, overwrite=args.overwrite)
    print(f"wrote {args.out} ({config.method}), calibrated with {report.calibration}", file=sys.stderr)
    print("\n".join(report.lines()), file=sys.stderr)
    return 0
