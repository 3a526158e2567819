"""Worker options: merging, types, spellings of TensorRT-LLM, and the sentences for what is wrong."""

from pathlib import Path

import pytest

from diptych.config import Hardware, LlmConfig, load_llm_config, resolve_limits
from diptych.errors import ConfigError


@pytest.fixture
def write(tmp_path: Path):
    def write(text: str, name: str = "options.yaml") -> str:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def refuse(options: dict, config_file: str | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        load_llm_config("m", options, config_file)
    return caught.value.message


class TestMerging:
    def test_defaults(self):
        config = load_llm_config("m")
        assert config == LlmConfig(model="m")
        assert config.kv_cache_config.tokens_per_block == 32
        assert config.kv_cache_config.free_gpu_memory_fraction == 0.9
        assert config.kv_cache_config.enable_block_reuse
        assert config.scheduler_config.capacity_scheduler_policy == "GUARANTEED_NO_EVICT"
        assert config.cache_transceiver_config.backend == "DEFAULT"
        assert config.server_role == "BOTH"

    def test_file_wins_over_command_line(self, write):
        file = write("max_batch_size: 8\nport: 9000\n")
        config = load_llm_config("m", {"max_batch_size": 16, "max_seq_len": 100, "port": 1}, file)
        assert (config.max_batch_size, config.max_seq_len, config.port) == (8, 100, 9000)

    def test_kv_cache_config_is_merged_key_by_key(self, write):
        file = write("kv_cache_config:\n  tokens_per_block: 16\n")
        config = load_llm_config("m", {"free_gpu_memory_fraction": 0.5}, file)
        assert config.kv_cache_config.free_gpu_memory_fraction == 0.5
        assert config.kv_cache_config.tokens_per_block == 16

    def test_kv_cache_config_of_file_wins_inside(self, write):
        file = write("kv_cache_config: {free_gpu_memory_fraction: 0.2}\n")
        config = load_llm_config("m", {"free_gpu_memory_fraction": 0.5}, file)
        assert config.kv_cache_config.free_gpu_memory_fraction == 0.2

    def test_null_section_means_defaults(self, write):
        config = load_llm_config("m", None, write("kv_cache_config:\nscheduler_config: null\n"))
        assert config == LlmConfig(model="m")

    def test_empty_file(self, write):
        assert load_llm_config("m", None, write("# nothing\n")) == LlmConfig(model="m")

    def test_chat_template_from_file_and_inline(self, tmp_path: Path):
        template = tmp_path / "template.jinja"
        template.write_text("{{ messages }}")
        assert load_llm_config("m", {"chat_template": str(template)}).chat_template == "{{ messages }}"
        assert load_llm_config("m", {"chat_template": "{% x %}"}).chat_template == "{% x %}"
        assert "nowhere.jinja" in refuse({"chat_template": "nowhere.jinja"})

    def test_model_name(self, tmp_path: Path):
        folder = tmp_path / "tiny"
        folder.mkdir()
        assert load_llm_config(str(folder)).model_name == "tiny"
        assert load_llm_config(f"{folder}/").model_name == "tiny"
        assert load_llm_config("owner/name").model_name == "owner/name"
        assert load_llm_config("owner/name", {"served_model_name": "x"}).model_name == "x"


class TestSpellings:
    def test_options_of_seed_documents(self, write, caplog: pytest.LogCaptureFixture):
        file = write(
            "disable_overlap_scheduler: True\n"
            "cache_transceiver_config:\n  backend: UCX\n  max_tokens_in_buffer: 2048\n"
        )
        config = load_llm_config("m", {"backend": "pytorch", "server_role": "context"}, file)
        assert config.cache_transceiver_config.backend == "UCX"
        assert config.cache_transceiver_config.max_tokens_in_buffer == 2048
        assert config.server_role == "CONTEXT"
        assert caplog.messages == []

    def test_pytorch_backend_config(self, write, caplog: pytest.LogCaptureFixture):
        file = write("pytorch_backend_config: {enable_iter_perf_stats: true, enable_overlap_scheduler: on}\n")
        assert load_llm_config("m", None, file).enable_iter_perf_stats
        assert len(caplog.messages) == 1
        assert "pytorch_backend_config" in caplog.text

    def test_pytorch_backend_config_wants_a_bool(self, write):
        file = write("pytorch_backend_config: {enable_overlap_scheduler: 3}\n")
        assert "enable_overlap_scheduler must be true or false, not 3" in refuse({}, file)

    def test_old_name_of_buffer_size(self, write, caplog: pytest.LogCaptureFixture):
        file = write("cache_transceiver_config: {backend: ucx, max_num_tokens: 512}\n")
        section = load_llm_config("m", None, file).cache_transceiver_config
        assert (section.backend, section.max_tokens_in_buffer) == ("UCX", 512)
        assert "max_tokens_in_buffer" in caplog.text

    def test_short_names(self):
        config = load_llm_config("m", {"tp_size": 1, "ep_size": 1, "kv_cache_dtype": "bfloat16"})
        assert config.moe_expert_parallel_size == 1
        assert config.kv_cache_config.dtype == "bfloat16"

    def test_known_options_without_effect_are_named_once(self, write, caplog: pytest.LogCaptureFixture):
        file = write(
            "cuda_graph_config: null\n"
            "print_iter_log: true\n"
            "kv_cache_config: {use_uvm: true, tokens_per_block: 64}\n"
            "scheduler_config: {context_chunking_policy: EQUAL_PROGRESS}\n"
        )
        config = load_llm_config("m", None, file)
        assert config.kv_cache_config.tokens_per_block == 64
        [message] = caplog.messages
        for name in (
            "cuda_graph_config",
            "print_iter_log",
            "kv_cache_config.use_uvm",
            "context_chunking_policy",
        ):
            assert name in message
        assert "no effect" in message

    def test_fields_that_nothing_acts_on_are_named_when_set(self, write, caplog: pytest.LogCaptureFixture):
        load_llm_config("m", None, write("kv_cache_config: {host_cache_size: 0}\n"))
        assert caplog.messages == []
        config = load_llm_config("m", None, write("kv_cache_config: {host_cache_size: 9}\n"))
        assert config.kv_cache_config.host_cache_size == 9
        assert "host_cache_size" in caplog.text

    @pytest.mark.parametrize("role", ["generation", "Generation", "GENERATION"])
    def test_role_in_any_case(self, role: str):
        assert load_llm_config("m", {"server_role": role}).server_role == "GENERATION"


class TestRefusals:
    def test_unknown_key_names_file_key_and_nearest(self, write):
        file = write("max_batchsize: 3\n")
        message = refuse({}, file)
        assert file in message
        assert '"max_batchsize"' in message
        assert 'did you mean "max_batch_size"?' in message

    def test_unknown_key_in_a_section(self, write):
        message = refuse({}, write("kv_cache_config: {token_per_block: 3}\n"))
        assert '"kv_cache_config.token_per_block"' in message
        assert 'did you mean "tokens_per_block"?' in message

    def test_unknown_key_unlike_any(self, write):
        assert "known here: backend, kv_transfer_timeout_ms" in refuse(
            {}, write("cache_transceiver_config: {zzzzz: 3}\n")
        )

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("max_batch_size: 0", "max_batch_size must be a whole number >= 1, not 0"),
            ("max_batch_size: many", "max_batch_size must be a whole number, not 'many'"),
            ("max_batch_size: true", "max_batch_size must be a whole number, not True"),
            ("enable_iter_perf_stats: 1", "enable_iter_perf_stats must be true or false, not 1"),
            (
                "kv_cache_config: {free_gpu_memory_fraction: 1.5}",
                "kv_cache_config.free_gpu_memory_fraction must be a number <= 1.0, not 1.5",
            ),
            (
                "scheduler_config: {capacity_scheduler_policy: STATIC_BATCH}",
                "capacity_scheduler_policy must be one of GUARANTEED_NO_EVICT, MAX_UTILIZATION",
            ),
            ("load_format: fast", "load_format must be one of auto, dummy, not 'fast'"),
            ("kv_cache_config: 3", "kv_cache_config must be a mapping, not 3"),
            ("backend: vllm", "backend must be one of pytorch"),
            ("pipeline_parallel_size: 2", "pipeline_parallel_size must be 1, not 2: in this version"),
            ("tensor_parallel_size: 0", "tensor_parallel_size must be"),
            ("max_beam_width: 4", "max_beam_width must be 1, not 4"),
            ("port: 70000", "port must be from 0 to 65535, not 70000"),
            ("server_role: MM_ENCODER", "MM_ENCODER is not supported"),
            ("server_role: CONTXT", "did you mean CONTEXT?"),
            ("- a\n- b", "must hold a mapping"),
            ("3: a", "the key 3 must be text"),
            ("a: [", "is not valid YAML: line"),
            ("port: 1\nport: 2", 'line 2: the key "port" is written twice'),
        ],
    )
    def test_sentences(self, write, text: str, expected: str):
        file = write(text + "\n")
        message = refuse({}, file)
        assert expected in message
        assert file in message

    def test_error_of_the_command_line_says_so(self):
        assert refuse({"ep_size": 4}).startswith("command line: moe_expert_parallel_size must be 1")

    def test_missing_file(self, tmp_path: Path):
        assert "No such file" in refuse({}, str(tmp_path / "absent.yaml"))

    def test_not_text(self, tmp_path: Path):
        path = tmp_path / "binary.yaml"
        path.write_bytes(b"\xff\xfe\x00")
        assert "not UTF-8" in refuse({}, str(path))


class TestLimits:
    def test_cpu(self):
        limits = resolve_limits(LlmConfig(model="m"), Hardware(device="cpu", num_cores=6))
        assert (limits.max_batch_size, limits.max_num_tokens, limits.num_threads) == (64, 512, 6)

    def test_gpu(self):
        limits = resolve_limits(LlmConfig(model="m"), Hardware(device="cuda", num_cores=6))
        assert (limits.max_batch_size, limits.max_num_tokens) == (2048, 8192)

    def test_what_the_user_wrote_stays(self):
        config = LlmConfig(model="m", max_batch_size=3, max_num_tokens=7, num_threads=1)
        limits = resolve_limits(config, Hardware(device="cpu", num_cores=6))
        assert str(limits) == "device cpu, max_batch_size 3, max_num_tokens 7, num_threads 1"

    def test_a_step_has_a_token_for_each_sequence(self):
        config = LlmConfig(model="m", max_num_tokens=7)
        assert resolve_limits(config, Hardware(device="cpu", num_cores=1)).max_batch_size == 7
