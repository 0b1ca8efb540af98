import pytest, torch
from zoo import CASES
from comfyui_duca.cache_core import find_family
from comfyui_duca.cache_core.engine.linear_sites import find_linears
from comfyui_duca.cache_core.calibration.low_rank import Magnitudes, measuring
from test_every_family import network, sample
@pytest.mark.parametrize("case", [c for c in CASES], ids=lambda c: c.name)
def test_mag(case):
    model = case.make(); net = network(model); fam = find_family(net)
    if not fam.linears: pytest.skip()
    sites = find_linears(fam, net); m = Magnitudes()
    with measuring("a", sites, m):
        sample(case, model, 2)
    missing = [s.name for s in sites if s.name not in m._means]
    assert not missing, missing[:5]
