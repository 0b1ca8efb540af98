"""The page's two routes on a running server: what a plan looks like, what a run sends while it goes on, and what is refused."""

from __future__ import annotations

import copy
import json
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from helpers.watching import watch

ROOT = Path(__file__).resolve().parents[2]
DEMO = json.loads((ROOT / "workflows" / "api" / "duca_demo_flux.json").read_text())
CACHE = next(key for key, value in DEMO.items() if value["class_type"] == "DuCaCache")
SAMPLER = next(key for key, value in DEMO.items() if value["class_type"] == "KSampler")


@pytest.fixture(scope="module")
def ask(server):
    """Returns a function that posts a request and gives the status and the answer."""

    def asked(body, path="/duca_cache/plan"):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(server.url + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    return asked


def demo(seed=3, **cache) -> dict:
    """Returns the demo prompt. The host does not run again what it has run, so every test uses another `seed`."""
    prompt = copy.deepcopy(DEMO)
    prompt[SAMPLER]["inputs"].update(steps=8, seed=seed)
    prompt[CACHE]["inputs"].update(cache)
    return prompt


def request(steps=28, schedule=None, node="none", calibration=None, **cache) -> dict:
    return {"node_id": node, "cache": cache, "schedule": schedule, "calibration": calibration, "sampling": {"steps": steps}}


@pytest.mark.parametrize(("start", "stop", "plan"), [(0, 10, "FaaaFaaaFa"), (10, 10000, "FaaaFaaaFa"), (18, 20, "FF")])
def test_one_of_several_samplers_runs_a_part_of_the_steps(ask, start, stop, plan):
    """As with Wan 2.2's two experts, which share 20 steps."""
    body = request(20, speedup=3.5)
    body["sampling"] |= {"start_at_step": start, "end_at_step": stop}
    answer = ask(body)[1]
    assert (answer["steps"], answer["plan"]) == (len(plan), plan)


@pytest.mark.parametrize("sampler", ["euler_ancestral", "lcm", "dpmpp_2m_sde"])
def test_a_sampler_that_adds_noise_is_shown_as_it_will_run(ask, sampler):
    body = request(20, speedup=2.8)
    body["sampling"]["sampler_name"] = sampler
    answer = ask(body)[1]
    assert answer["plan"] == "F" * 20 and answer["name"] == "auto 2.8x, computed in full"
    assert any("adds noise" in note for note in answer["notes"])


def test_a_plan_without_a_run(ask):
    status, answer = ask(request(speedup=3.5))
    assert status == 200
    assert answer["plan"] == "FaFaFaaaFaaaFaaaFaaaFaaaFaaa" and answer["name"] == "auto 3.5x"
    assert answer["counts"] == {"F": 8, "i": 0, "c": 0, "a": 20}
    assert [kind["letter"] for kind in answer["kinds"]] == ["F", "i", "c", "a"]
    assert answer["is_counted"] is False and answer["cache_bytes"] is None and 3.4 < answer["speedup"] < 3.5
    assert answer["quality"] == "not calibrated" and answer["expected"] is None and not answer["assumed_steps"]
    assert [preset["name"] for preset in answer["presets"]] == ["Best quality", "Balanced", "Fast", "Draft"]
    assert ask({})[1]["assumed_steps"] is True


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ({"kind": "front-loaded", "speedup": 2.8}, "FaFaFaFaFaaaFaaaFaaaFaaaFaaF"),
        ({"kind": "DuCa cycle", "cycle_length": 5, "warmup": 3}, "FFFcacaFcacaFcacaFcacaFcacaF"[:28]),
        ({"kind": "fixed interval", "cycle_length": 4, "warmup": 1, "tail": 1}, "FaaaFaaaFaaaFaaaFaaaFaaaFaaF"),
        ({"kind": "custom text", "text": "3F (Faa)* 2F"}, "FFF" + "Faa" * 7 + "Fa" + "FF"),
        ({"kind": "custom text", "text": "Fa", "unit": "steps", "skip_from": 4, "skip_to": 9}, "FFFFFaFaF" + "F" * 19),
        ({"kind": "fixed interval", "speedup": 2, "skip_from": 50, "skip_to": 100, "warmup": 0}, "F" * 14 + "aF" * 7),
    ],
)
def test_a_schedule_takes_the_sliders_place(ask, schedule, expected):
    status, answer = ask(request(schedule=schedule, speedup=6))
    assert status == 200 and answer["plan"] == expected


def test_a_wrong_character_is_pointed_at(ask):
    status, answer = ask(request(schedule={"kind": "custom text", "text": "F c x a"}))
    assert status == 400 and answer["input"] == "text" and answer["position"] == 4 and "'x'" in answer["error"]


@pytest.mark.parametrize(
    "body",
    [
        b"no json",
        b"[]",
        {"cache": 3},
        {"cache": {"speedup": "fast"}},
        {"cache": {"speedup": 99}},
        {"cache": {"speedup": True}},
        {"cache": {"mode": "turbo"}},
        {"cache": {"verbose": 1}},
        {"cache": {"start_percent": 0.9, "end_percent": 0.1}},
        {"schedule": {"kind": "custom text", "text": 5}},
        {"schedule": {"unit": "steps", "skip_from": 9, "skip_to": 3}},
        {"sampling": {"steps": 0}},
        {"sampling": {"steps": 10**9}},
        {"sampling": {"steps": "28"}},
        {"sampling": {"steps": 28, "start_at_step": 28, "end_at_step": 10000}},
        {"sampling": {"steps": 28, "end_at_step": 0}},
        {"sampling": {"steps": 28, "start_at_step": "1"}},
        {"calibration": "../../etc/passwd"},
        {"calibration": "/etc/passwd"},
        {"calibration": 7},
    ],
    ids=str,
)
def test_nonsense_is_refused_in_words(ask, body):
    status, answer = ask(body)
    assert status == 400 and answer["error"] and "/etc" not in answer["error"]


def test_too_much_is_refused(ask):
    assert ask({"cache": {"predictor": "x" * 100_000}})[0] == 413


def test_plans_of_200_steps_are_answered(ask, client):
    """How long that takes is measured in bench/overhead.py."""
    client.run(demo())
    for schedule in (None, {"kind": "front-loaded"}, {"kind": "DuCa cycle", "speedup": 3}, {"kind": "custom text", "text": "3F (Fca)*"}):
        status, answer = ask(request(steps=200, schedule=schedule, node=CACHE))
        assert status == 200 and len(answer["plan"]) == 200, schedule


def test_after_a_run_costs_are_counted_and_the_plan_is_what_was_run(ask, client):
    done = client.run(demo(6, speedup=2.0))
    report = done.outputs[next(key for key, value in DEMO.items() if value["class_type"] == "DuCaCacheReport")]["duca_cache_report"][0]
    status, answer = ask(request(steps=8, node=CACHE, speedup=2.0))
    assert status == 200 and answer["is_counted"]
    assert answer["plan"] == report["plan"] and answer["cache_bytes"] == report["peak_bytes"]
    assert answer["speedup"] == pytest.approx(report["compute_speedup"], rel=1e-6)


def watched(server, prompt) -> list[dict]:
    """Returns the pack's messages of one run."""
    return [message["data"] for message in watch(server.url, prompt)[1] if message["type"] == "duca_cache.run"]


def test_a_run_is_told_as_it_goes(server):
    messages = watched(server, demo(4, speedup=2.0))
    assert [message["event"] for message in messages] == ["start", *["evaluation"] * 8, "end"]
    assert {message["node"] for message in messages} == {CACHE} and len({message["run"] for message in messages}) == 1
    assert "".join(message["kind"] for message in messages[1:-1]) == messages[0]["plan"]
    assert [message["index"] for message in messages[1:-1]] == list(range(8)) == [message["step"] for message in messages[1:-1]]
    assert messages[-1]["complete"] and messages[-1]["report"]["plan"] == messages[0]["plan"]
    with urllib.request.urlopen(f"{server.url}/duca_cache/run?node_id={CACHE}", timeout=10) as answer:
        kept = json.load(answer)
    assert kept["run"] == messages[0]["run"] and not kept["active"] and kept["report"] == messages[-1]["report"]
    assert [e["kind"] for e in kept["evaluations"]] == list(messages[0]["plan"])
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(f"{server.url}/duca_cache/run?node_id=99", timeout=10)


def test_two_evaluations_a_step_are_told_one_by_one(server):
    prompt = demo(5, speedup=2.0)
    prompt[SAMPLER]["inputs"]["sampler_name"] = "heun"
    messages = watched(server, prompt)
    assert [message["event"] for message in messages].count("evaluation") == 15 and messages[0]["steps"] == 8
