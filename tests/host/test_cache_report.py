"""Cache Report shows the run that made a latent, and says so if it shows another one."""

from __future__ import annotations

import pytest
import torch
from comfyui_duca.nodes.cache_report import CacheReport
from comfyui_duca.nodes.demo_flux import load_demo_model
from helpers.sampling import cached, sample

WORDS = "did not come from any of this model's last runs"


@pytest.fixture(scope="module")
def runs() -> tuple:
    """Returns a cached model with its latents of 3 and 4 steps, and another model with its latent of 5."""
    one, other = cached(load_demo_model(), speedup=2.0), cached(load_demo_model(), speedup=3.0)
    return one, sample(one, steps=3, size=(24, 24)), sample(one, steps=4, size=(24, 24)), other, sample(other, steps=5, size=(24, 24))


def report(latent: torch.Tensor, model) -> tuple[str, str]:
    """Returns the text for other nodes and the text that is shown."""
    output = CacheReport.execute({"samples": latent}, model)
    return output.args[0], output.ui["text"][0]


def test_each_latent_has_its_own_run(runs):
    one, three, four, other, five = runs
    for latent, model, count in ((three, one, 3), (four, one, 4), (five, other, 5), (four.clone().double(), one, 4)):
        for text in report(latent, model):
            assert f"evaluations  {count}:" in text and WORDS not in text


def test_the_latent_of_another_model(runs):
    one, three, _, other, five = runs
    for latent, model, latest in ((five, one, 4), (three, other, 5), (three + 0.1, one, 4), (three[..., :12], one, 4)):
        for text in report(latent, model):
            assert text.lstrip().startswith("This latent") and WORDS in text and f"evaluations  {latest}:" in text


def test_what_cannot_be_told_is_not_said(runs):
    """A latent of several tensors cannot be assigned to a run."""
    nested = torch.nested.nested_tensor([torch.zeros(3, 2), torch.zeros(2, 2)])
    assert WORDS not in report(nested, runs[0])[0]
