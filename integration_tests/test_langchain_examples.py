"""LangChain's examples as people run them: on the real model, in processes of their own."""

import http.client
import json
import os
import re
import subprocess
import sys
import time

import pytest

from integration_tests.conftest import ROOT

EXAMPLES = ROOT / "examples" / "langchain"
TIMEOUT_S = 60


@pytest.fixture
def run_example(run_python, sample_model):
    def run(name):
        done = run_python(str(EXAMPLES / name), "--model", sample_model, timeout_s=590)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def numbers(*fields):
    return [int(field.replace(",", "")) for field in fields]


def test_chain_reuses_its_document_and_again_in_a_new_process(run_example):
    reused = [numbers(*re.findall(r"([\d,]+) of them reused", run_example("two_questions.py"))) for _ in range(2)]
    assert reused[0][0] == 0 < reused[0][1]
    assert reused[1][0] > 0


def test_each_call_of_an_agents_model_reads_what_is_new_and_at_most_a_block_more(run_example):
    table = re.findall(r"^ +(\d) +([\d,]+) +(\d+) +(\d+) +(\d+)  (.*)$", run_example("agent.py"), re.MULTILINE)
    turns = [(*numbers(*row[:-1]), row[-1]) for row in table]
    assert [turn for turn, *_ in turns] == [turn for turn in range(1, 9) for _ in ("a call", "an answer")]
    block_size = 32
    known = 0
    for _, prompt_tokens, new_tokens, prefilled, at_most, _ in turns:
        assert prefilled <= new_tokens + block_size == at_most
        assert prompt_tokens - new_tokens >= known
        known = prompt_tokens
    calls = {says.partition("(")[0] for *_, says in turns[::2]}
    assert calls == {"count_words", "list_headings", "find_pages"}
    assert all(says and "(" not in says for *_, says in turns[1::2])


def test_rag_chain_reads_a_section_once_and_answers_as_without_a_cache(run_example):
    table = re.findall(r"^(.*\?|total) +(\d+) +(\d+) +\S+ s +\S+ s  (.*)$", run_example("rag.py"), re.MULTILINE)
    *questions, (_, *total) = [(name, *numbers(prompt, prefilled), same) for name, prompt, prefilled, same in table]
    assert len(questions) == 10
    assert {same for *_, same in questions} == {"yes"}
    assert total == [sum(row[1] for row in questions), sum(row[2] for row in questions), "yes"]
    # Of the first to find a section, nearly all is read; of the others, the question and what doesn't fill a block.
    assert sum(prefilled < prompt / 2 for _, prompt, prefilled, _ in questions) >= 5


def test_structured_output_is_of_the_schema_and_shares_its_examples(run_example):
    *rows, summary = run_example("structured_output.py").splitlines()[1:]
    assert len(rows) == 4
    for row in rows:
        assert re.fullmatch(r".{52} \S.{0,11} +\S.{0,11} +\d{1,2}  (train|car|plane|bicycle)", row)
    assert re.search(r"4 requests: .* [1-9]\d*% reused", summary)


# Server-sent events


@pytest.fixture
def server(sample_model, tmp_path):
    """The port of the example's server, and its process."""
    process = subprocess.Popen(
        [sys.executable, "-u", str(EXAMPLES / "stream_server.py"), "--model", sample_model, "--port", "0"],
        cwd=ROOT,
        env={**os.environ, "HOME": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in process.stderr:
        running = re.search(r"running on http://127\.0\.0\.1:(\d+)", line)
        if running:
            break
    assert running, "the server ended before it ran"
    yield int(running[1]), process
    process.terminate()
    process.communicate(timeout=TIMEOUT_S)


def get(port, path):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
    connection.request("GET", path)
    return connection, connection.getresponse()


def num_active(port):
    connection, response = get(port, "/active")
    try:
        return json.load(response)
    finally:
        connection.close()


def events(response):
    for line in response:
        if line.strip():
            yield json.loads(line.decode().removeprefix("data: "))


def test_server_sends_events_while_it_answers_and_drops_the_request_of_a_client_that_leaves(server):
    port, process = server

    connection, response = get(port, "/ask?question=Write+a+long+story+about+a+cat.")
    assert response.getheader("Content-Type").startswith("text/event-stream")
    arriving = events(response)
    assert "text" in next(arriving)
    assert num_active(port) == 1  # it is read while it is written
    *texts, last = arriving
    assert len(texts) > 20
    assert last["usage"]["output_tokens"] > len(texts)
    connection.close()

    # The whole answer would take minutes.
    connection, response = get(port, "/ask?question=Count+from+1+to+1000.&max_tokens=4000")
    assert "text" in next(events(response))
    assert num_active(port) == 1
    response.close()
    connection.close()
    deadline_s = time.monotonic() + TIMEOUT_S
    while num_active(port):
        assert time.monotonic() < deadline_s
    process.terminate()
    printed, _ = process.communicate(timeout=TIMEOUT_S)
    assert re.search(r"went away after \d+ events", printed)
