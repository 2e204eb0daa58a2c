"""The lines of docs/service.md that are marked for it, run as they stand in a shell beside a real server."""

from __future__ import annotations

import json
import os
import re
import subprocess
import zipfile

import pytest

from tests.serve_tools import KEY, Process, free_port
from tests.toys import REPOSITORY

MARKED = re.compile(r"<!-- test: service -->\n```bash\n(.*?)```", re.S)


@pytest.mark.slow
def test_the_lines_of_the_page_run_as_they_stand(tiny, tmp_path):
    blocks = MARKED.findall((REPOSITORY / "docs" / "service.md").read_text())
    assert len(blocks) >= 3
    process = Process(tiny.model, tmp_path / "server", free_port(), served_name="mine")
    process.start()
    (tmp_path / "shell").mkdir()
    env = {**os.environ, "TINKER_BASE_URL": process.url, "TINKER_API_KEY": KEY}
    try:
        for block in blocks:
            text = block.replace("\\\n", " ")
            for line in text.splitlines():
                done = subprocess.run(
                    ["bash", "-euo", "pipefail", "-c", line],
                    cwd=tmp_path / "shell",
                    env=env,
                    capture_output=True,
                    text=True,
                    check=False,
                    timeout=120,
                )
                assert done.returncode == 0 and not done.stderr, (line, done.stderr)
                assert '"error"' not in done.stdout, (line, done.stdout)
                if "/v1/rewards" in line:
                    assert json.loads(done.stdout)["updates"] == 1
                if "/metrics" in line:
                    assert "grpo_gsm8k_rollouts_version 1.0" in done.stdout
                if "chat/completions" in line:
                    assert done.stdout.endswith("data: [DONE]\n\n")
        assert zipfile.ZipFile(tmp_path / "shell" / "weights.zip").testzip() is None
    finally:
        process.end()
