#!/bin/sh
# dp-accounting 0.6.0, PLD accountant, add-or-remove neighbours: below a delta of about 1e-14 the epsilon of many
# releases is infinite, although a finite one exists, and just above that it is too small, which is worse.
#
# Seen 2026-11-29, with 200 Gaussian releases of noise multiplier 0.66 over Poisson samples of 256 of 50,000 users:
#   delta 1e-14: PLD 7.76; numerical inversion of the characteristic function with an exponential tilt gives 7.83
#   delta 1e-15: PLD infinite; the RDP accountant of the same package bounds epsilon by less than 10
# The smallest probability that the Fourier transform of a composition can tell from rounding is about 1e-14 of all
# mass, and grows with the number of releases. So a delta below 1e-12 should be left to the RDP accountant.
#
# Exits with 1 if this changes.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check dp-accounting==0.6.0
"$folder/venv/bin/python" - <<'PYTHON'
import math
import sys

import dp_accounting as dp
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant

release = dp.PoissonSampledDpEvent(256 / 50_000, dp.GaussianDpEvent(0.66))
event = dp.SelfComposedDpEvent(release, 200)
pld, rdp = PLDAccountant().compose(event), RdpAccountant().compose(event)
found = {delta: (pld.get_epsilon(delta), rdp.get_epsilon(delta)) for delta in (1e-13, 1e-14, 1e-15)}
for delta, (by_pld, by_rdp) in found.items():
    print(f"delta {delta:g}: PLD {by_pld:.3f}, RDP {by_rdp:.3f}")
below = found[1e-14][0] < 7.8
infinite = math.isinf(found[1e-15][0]) and found[1e-15][1] < 10
print("as described" if below and infinite else "changed")
sys.exit(0 if below and infinite else 1)
PYTHON
