"""What people type: the command, the examples and the README's code, with the real model, in new processes."""

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = ["examples/llama_index/two_questions.py"]  # the others have test modules of their own
COMMAND = str(Path(sys.executable).with_name("omlx-plugins"))


def succeeded(done):
    assert done.returncode == 0, done.stderr
    return done


def test_generate_prints_the_answer_and_reuses_it_in_the_next_process(run_python, sample_model, document, tmp_path):
    arguments = (COMMAND, "generate", "--model", sample_model, "--paged-ssd-cache-dir", str(tmp_path))
    arguments = (*arguments, "--block-size", "64", "--max-tokens", "8", document)
    first = succeeded(run_python(*arguments))
    second = succeeded(run_python(*arguments))
    assert first.stdout == second.stdout != ""
    assert " 0 reused from RAM, 0 from SSD" in first.stderr
    assert re.search(r" 0 reused from RAM, [1-9]\d* from SSD", second.stderr), second.stderr
    assert re.search(r"SSD: ([1-9]\d*) blocks, (\S+ MiB); written: \2 now, \2 in 24 hours", first.stderr), first.stderr
    assert re.search(r"SSD: .* written: 0 B now", second.stderr), second.stderr


@pytest.mark.parametrize("example", EXAMPLES)
def test_example_reuses_its_prefix_and_again_in_a_new_process(run_python, sample_model, example):
    first = succeeded(run_python(example, sample_model)).stdout
    second = succeeded(run_python(example, sample_model)).stdout
    reused = [[int(n) for n in re.findall(r"(\d+) of them reused", text)] for text in (first, second)]
    assert reused[0][0] == 0 < reused[0][1]
    assert reused[1][0] > 0


@pytest.mark.parametrize("page", ["README.md", "docs/engine.md", "docs/langchain.md", "docs/llama_index.md"])
def test_documented_code_runs(run_python, sample_model, document, tmp_path, page):
    text = (ROOT / page).read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) >= 2
    code = "\n".join([f"handbook = {document!r}", *blocks])
    code = re.sub(r'"mlx-community/[^"]+"|"path or repo id"', repr(sample_model), code)
    (tmp_path / "documented.py").write_text(code, encoding="utf-8")
    succeeded(run_python(str(tmp_path / "documented.py")))


@pytest.mark.timeout(1300)  # minutes on a busy machine
def test_demo_reuses_its_context_from_everywhere_and_changes_no_answer(run_python, sample_model):
    done = succeeded(run_python(COMMAND, "demo", "--model", sample_model, "--sections", "2", timeout_s=1200))
    assert "Every answer equals the one without a cache." in done.stdout
    rows = re.findall(r"^  (L.*?)  +([\d,]+) +([\d,]+) +([\d,]+) .* yes$", done.stdout, re.MULTILINE)
    reused = [(asked_by, from_ram != "0", from_ssd != "0") for asked_by, _, from_ram, from_ssd in rows]
    assert reused == [
        ("LangChain, question 1", False, False),
        ("LangChain, question 2", True, False),
        ("LangChain, question 3", True, False),
        ("LlamaIndex, same process", True, False),
        ("LangChain, new process", False, True),
    ]
    assert done.stderr == ""
