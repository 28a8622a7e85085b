"""CircuitsVis panels: right numbers, one script, no network."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import browser
import pytest
import torch

from mansu_interp.errors import ViewError
from mansu_interp.models.language_model import LanguageModel
from mansu_interp.tasks.task import Task
from mansu_interp.viz.tokens import attention_patterns, plain_token, token_log_probs

pytest.importorskip("circuitsvis")


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fails afterwards too: CircuitsVis swallows every error of its own probe."""
    asked: list[Any] = []

    def refuse(*where: Any, **_: Any) -> None:
        asked.append(where)
        raise OSError("no network here")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    yield
    assert asked == []


def test_log_probs_say_what_the_model_says(no_network: None, facts: LanguageModel, capitals: Task):
    pair = capitals.forget[0]
    view = token_log_probs({"before": facts, "quantized": facts}, pair)
    with torch.no_grad():
        last = facts.all_logits(torch.tensor([pair.clean]))[0, -1].log_softmax(-1)
    assert f"before, clean: log-prob of {pair.answer_text!r} {float(last[pair.answer]):+.2f}" in (
        repr(view)
    )
    assert view.html.count("CircuitsVis.TokenLogProbs") == 4
    assert len(view._repr_html_()) < 2_500_000  # the library once, not four times


def test_attention_of_both_prompts(no_network: None, facts: LanguageModel, capitals: Task):
    view = attention_patterns({"before": facts}, capitals.forget[0], 1, 2)
    assert "a1.h2, before, corrupt" in view.html and "looks most at" in repr(view)
    with pytest.raises(ViewError, match=r"No head a9\.h0 in before"):
        attention_patterns({"before": facts}, capitals.forget[0], 9, 0)


def test_a_token_cannot_end_the_script():
    assert "</script" not in plain_token("</script>") and "<!--" not in plain_token("<!--")
    assert "<SCRIPT" not in plain_token("<SCRIPT") and plain_token("<bos> a < b") == "<bos> a < b"


@pytest.mark.skipif(bool(browser.missing()), reason=browser.missing() or "-")
def test_the_page_draws_without_a_network(facts: LanguageModel, capitals: Task, tmp_path: Path):
    pages = [
        token_log_probs({"before": facts}, capitals.forget[0]).to_html(tmp_path / "t.html"),
        attention_patterns({"before": facts}, capitals.forget[0], 1, 2).to_html(
            tmp_path / "a.html"
        ),
    ]
    with browser.chromium() as driver:
        for page in pages:
            driver.get(page.as_uri())
            driver.implicitly_wait(10)
            blocks = driver.find_elements("css selector", "[id^=circuits-vis] *")
            assert len(blocks) > 5
            assert browser.complaints(driver) == []
            assert set(browser.requests(driver)) == {page.as_uri()}
