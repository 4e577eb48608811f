"""SeedVR2."""

from flashvaed_cli.families.seedvr2.names import SEEDVR2_ORIGINAL
from flashvaed_cli.families.seedvr2.spec import SEEDVR2

FAMILIES = (SEEDVR2,)
LAYOUTS = (SEEDVR2_ORIGINAL,)
