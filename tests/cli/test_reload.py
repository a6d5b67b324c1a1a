"""`loopsway reload`: a script that has published a generation waits until it is answered from."""

from __future__ import annotations

import shutil
from pathlib import Path

from loopsway.service import Settings
from serving import running, without_model

from .conftest import invoke


def test_a_reload_says_what_answers_now_or_why_it_is_refused(tiny_index: Path, tmp_path: Path) -> None:
    index = shutil.copytree(tiny_index, tmp_path / "tiny.index")
    with running(Settings(indices=(without_model(index),), port=0, grace_s=0, reload_poll_s=0)) as (_, port):
        reload = ["reload", "--server", f"127.0.0.1:{port}"]
        assert invoke(reload).stdout == "tiny answers from generation 1: 48 examples\n"
        assert invoke(["delete", index, "--ids", "tiny-3"]).exit_code == 0
        assert invoke([*reload, "tiny"]).stdout == "tiny answers from generation 2: 47 examples\n"
        (index / "manifest.json").write_text("{}")
        refused = invoke(reload)
        assert refused.exit_code == 1
        assert refused.stderr.startswith(
            "Error: index: generation unknown of index tiny is refused, generation 2 goes on: "
        )
        assert invoke([*reload, "other"]).exit_code == 1
