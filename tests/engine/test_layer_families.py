"""Sliding windows, recurrent layers and mixtures of them: restored, they answer as if they had read it all."""

import random
from pathlib import Path

import pytest
from tiny_models import tiny_gemma3, tiny_lfm2, tiny_mamba
from tiny_tokenizer import tiny_tokenizer

from omlx_core import CacheSettings, Engine, EngineSettings

BLOCK_SIZE = 16
MODELS = {
    "window": tiny_gemma3,
    "window shorter than a block": lambda: tiny_gemma3(window=10),
    "window that is no multiple of a block": lambda: tiny_gemma3(window=21),
    "recurrent": tiny_mamba,
    "recurrent and full attention": tiny_lfm2,
}


def tokens(count, seed=1):
    return random.Random(seed).choices(range(512), k=count)


def generate(engine, prompt, max_tokens=12):
    return engine.generate(prompt, max_tokens=max_tokens, logprobs=True)


@pytest.fixture(scope="module", params=MODELS, ids=str)
def model(request):
    return MODELS[request.param]()


@pytest.fixture(params=["hot", "cold"])
def reopen(request, model, tmp_path: Path):
    """Gives the same engine again, or one in its place that finds everything on SSD."""
    settings = CacheSettings(block_size=BLOCK_SIZE, paged_ssd_cache_dir=tmp_path if request.param == "cold" else None)
    engines = [Engine(model, cache=settings)]

    def reopen():
        if request.param == "cold":
            engines[-1].close()
            engines.append(Engine(model, cache=settings))
        return engines[-1]

    yield reopen
    engines[-1].cache.check()
    assert engines[-1].cache.stats().hot.blocks_in_use == 0
    engines[-1].close()


def cold_run(model, prompt, max_tokens=12):
    with Engine(model, cache=CacheSettings(no_cache=True)) as engine:
        return generate(engine, prompt, max_tokens)


def assert_same(result, cold):
    assert result.token_ids == cold.token_ids
    assert result.logprobs == cold.logprobs


@pytest.mark.parametrize("length", [9, 17, 33, 48, 49, 70, 161, 300])
def test_exact_repeat_equals_the_cold_run(model, reopen, length):
    prompt = tokens(length)
    generate(reopen(), prompt)
    again = generate(reopen(), prompt)
    assert again.usage.cached_tokens == (length - 1) // BLOCK_SIZE * BLOCK_SIZE
    assert_same(again, cold_run(model, prompt))


def test_branch_at_a_block_boundary_is_restored_there_from_the_third_request_on(model, reopen):
    prompts = [tokens(10 * BLOCK_SIZE) + tokens(40, seed=seed) for seed in (2, 3, 4)]
    reused = []
    for prompt in prompts:
        result = generate(reopen(), prompt)
        reused.append(result.usage.cached_tokens)
        assert_same(result, cold_run(model, prompt))
    # Recurrent layers can be restored only where their state was kept: the second request keeps it there.
    assert reused[0] == 0
    assert reused[1] in (0, 160)
    assert reused[2] == 160


def test_branch_inside_a_block_equals_the_cold_run(model, reopen):
    trunk = tokens(150)
    generate(reopen(), trunk)
    for seed in (2, 3):
        branch = trunk[:100] + tokens(30, seed=seed)
        result = generate(reopen(), branch)
        assert_same(result, cold_run(model, branch))
    assert result.usage.cached_tokens == 96


def test_each_turn_of_a_conversation_computes_its_new_tokens_and_less_than_a_block(request, model, reopen):
    # Answers that ran through a full window are read again: they would differ in the last bits.
    num_new = 30 + (21 if "window" in request.node.callspec.id else 0)
    prompt = tokens(70)
    computed = []
    for turn in range(6):
        result = generate(reopen(), prompt, max_tokens=21)
        computed.append(len(prompt) - result.usage.cached_tokens)
        assert_same(result, cold_run(model, prompt, max_tokens=21))
        prompt = prompt + result.token_ids + tokens(30, seed=10 + turn)
    assert max(computed[1:]) <= num_new + BLOCK_SIZE


@pytest.mark.parametrize(("reuses_inexact", "reused"), [(None, 96), (False, 96), (True, 128)])
def test_answer_of_a_full_window_is_reused_only_where_that_is_asked_for(reuses_inexact, reused):
    settings = EngineSettings(reuse_inexact_answers=reuses_inexact)
    prompt = tokens(98)
    model = tiny_gemma3(window=100)
    with Engine(model, cache=CacheSettings(block_size=BLOCK_SIZE), settings=settings) as engine:
        answer = generate(engine, prompt, max_tokens=40)
        turn = prompt + answer.token_ids + tokens(20, seed=2)
        assert generate(engine, turn).usage.cached_tokens == reused


def test_answer_of_a_window_that_is_not_full_is_reused(tmp_path: Path):
    model, prompt = tiny_gemma3(window=128), tokens(98)
    with Engine(model, cache=CacheSettings(block_size=BLOCK_SIZE)) as engine:
        answer = generate(engine, prompt, max_tokens=60)
        turn = prompt + answer.token_ids + tokens(20, seed=2)
        result = generate(engine, turn)
    assert result.usage.cached_tokens == 128
    assert_same(result, cold_run(model, turn))


def test_checkpoints_of_a_long_prompt_are_as_many_as_the_setting_says():
    prompt = tokens(40 * BLOCK_SIZE + 5)
    settings = EngineSettings(checkpoint_stride_tokens=BLOCK_SIZE, max_stride_checkpoints=4)
    with Engine(tiny_mamba(), cache=CacheSettings(block_size=BLOCK_SIZE), settings=settings) as engine:
        engine.generate(prompt, max_tokens=1)
        reused = [generate(engine, [*prompt[:at], 1, 2, 3]).usage.cached_tokens for at in (170, 330, 490)]
    assert reused == [160, 320, 480]


def test_restored_requests_join_a_batch_of_other_lengths(model):
    trunk = tokens(96)
    prompts = [trunk + tokens(length, seed=length) for length in (2, 9, 40, 77)]
    cold = [cold_run(model, prompt, max_tokens=60) for prompt in prompts]
    with Engine(model, cache=CacheSettings(block_size=BLOCK_SIZE)) as engine:
        for _ in range(2):
            streams = [engine.stream(prompt, max_tokens=60, logprobs=True) for prompt in prompts]
            firsts = [next(stream) for stream in streams]
            results = [list(stream)[-1].result for stream in streams]
            assert len(firsts) == 4
            for result, expected in zip(results, cold, strict=True):
                assert result.token_ids == expected.token_ids
                assert result.logprobs == pytest.approx(expected.logprobs, abs=1e-5)


@pytest.mark.parametrize("make_model", [tiny_gemma3, tiny_lfm2])
def test_bytes_on_ssd_per_token_are_those_of_full_attention_and_few_checkpoints(make_model, tmp_path: Path):
    settings = CacheSettings(block_size=BLOCK_SIZE, paged_ssd_cache_dir=tmp_path)
    with Engine(make_model(), cache=settings) as engine:
        engine.generate(tokens(40 * BLOCK_SIZE + 1), max_tokens=1)
        engine.cache.flush()
        num_rows = num_windows = num_checkpoints = 0
        layers = {"rows": 2, "window": 4} if make_model is tiny_gemma3 else {"rows": 2, "window": 0}
        for entry in engine.cache.ssd.entries():
            payload = engine.cache.ssd.load_block(entry.block_hash, tokens_of(entry, engine))
            if payload is None:
                continue
            names = {name.rpartition(".")[2] for name in payload.tensors}
            row_bytes = BLOCK_SIZE * 2 * 16 * 2 * 4  # tokens, heads, dim, key and value, float32
            if names != {"keys", "values"}:
                num_checkpoints += 1
            elif payload.size_bytes == layers["rows"] * row_bytes:
                num_rows += 1
            else:
                assert payload.size_bytes == layers["window"] * row_bytes
                num_windows += 1
    assert num_rows == 40
    assert num_windows == (40 if layers["window"] else 0)
    assert num_checkpoints == (0 if layers["window"] else 1)


def tokens_of(entry, engine):
    prompt = tokens(40 * BLOCK_SIZE + 1)
    is_part = entry.block_hash not in engine_hashes(engine, prompt)
    return () if is_part else prompt[entry.depth * BLOCK_SIZE : (entry.depth + 1) * BLOCK_SIZE]


def engine_hashes(engine, prompt):
    table = engine.cache._paged.get_computed_blocks(prompt)
    hashes = [block.block_hash for block in table.blocks]
    engine.cache._paged.free_block_table(table)
    return hashes


def test_lost_checkpoint_or_window_costs_the_blocks_behind_the_one_before(tmp_path: Path):
    settings = CacheSettings(block_size=BLOCK_SIZE, paged_ssd_cache_dir=tmp_path)
    model, prompt = tiny_lfm2(), tokens(10 * BLOCK_SIZE + 5)
    steps = EngineSettings(checkpoint_stride_tokens=4 * BLOCK_SIZE)
    with Engine(model, cache=settings, settings=steps) as engine:
        engine.generate(prompt, max_tokens=1)
    [last] = [path for path in tmp_path.rglob("*.safetensors") if is_last_checkpoint(path)]
    last.write_bytes(last.read_bytes()[:-1])
    with Engine(model, cache=settings, settings=steps) as engine:
        result = generate(engine, prompt)
        assert engine.cache.stats().lost_blocks == 1
        again = generate(engine, prompt)
    assert (result.usage.cached_tokens, again.usage.cached_tokens) == (8 * BLOCK_SIZE, 10 * BLOCK_SIZE)
    assert_same(result, cold_run(model, prompt))


def is_last_checkpoint(path):
    from safetensors import safe_open

    with safe_open(path, "numpy") as file:
        metadata = file.metadata()
    return metadata["num_tokens"] == "0" and metadata["depth"] == "10"


def test_state_at_the_end_of_the_system_message_is_kept_for_other_conversations():
    system = {"role": "system", "content": "s" * 150}
    with Engine(tiny_lfm2(), tiny_tokenizer(512), cache=CacheSettings(block_size=BLOCK_SIZE)) as engine:
        engine.generate([system, {"role": "user", "content": "a" * 80}], max_tokens=1)
        other = engine.generate([system, {"role": "user", "content": "b" * 80}], max_tokens=1)
        shared = engine.count_tokens([system]) // BLOCK_SIZE * BLOCK_SIZE
    assert other.usage.cached_tokens >= shared - BLOCK_SIZE >= 128


@pytest.mark.parametrize("length", [66, 98, 130])
def test_no_single_token_is_left_to_prefill(model, reopen, length):
    # Of 66 tokens, 65 are prefilled: four blocks and one token more.
    prompt = tokens(length)
    generate(reopen(), prompt)
    again = generate(reopen(), prompt)
    assert again.usage.cached_tokens == length - 2 - BLOCK_SIZE
    assert_same(again, cold_run(model, prompt))


def test_exported_prefix_is_restored_from_in_another_folder(model, tmp_path: Path):
    prompt = tokens(150)
    here, there = (CacheSettings(block_size=BLOCK_SIZE, paged_ssd_cache_dir=tmp_path / name) for name in "ab")
    with Engine(model, cache=here) as engine:
        generate(engine, prompt)
        engine.cache.ssd.export(tmp_path / "warm.safetensors", token_ids=prompt)
    with Engine(model, cache=there) as engine:
        report = engine.cache.ssd.import_(tmp_path / "warm.safetensors")
        assert report.blocks_written == report.num_blocks >= 9
        assert engine.cache.ssd.check().is_clean
        result = generate(engine, prompt)
    assert result.usage.cached_tokens_cold == 144
    assert_same(result, cold_run(model, prompt))
