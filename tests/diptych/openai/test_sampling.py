import orjson
import pytest

from diptych.errors import InvalidRequest
from diptych.openai import SamplingDefaults, parse_chat, parse_completion, to_choice_text, to_sampling_params
from diptych.text import Tokenizer
from diptych.wire import SamplingParams, TokenEvent

DEFAULTS = SamplingDefaults()


def params(choice_index: int = 0, defaults: SamplingDefaults = DEFAULTS, **fields) -> SamplingParams:
    request = parse_completion(orjson.dumps({"prompt": "x"} | fields))
    return to_sampling_params(
        request, vocab_size=100, default_max_tokens=50, choice_index=choice_index, defaults=defaults
    )


def test_nothing_given():
    assert params(seed=1) == SamplingParams(max_tokens=50, seed=1)


def test_everything_given():
    given = {
        "max_tokens": 7,
        "min_tokens": 2,
        "temperature": 0.5,
        "top_k": 3,
        "top_p": 0.9,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.2,
        "frequency_penalty": -0.2,
        "seed": 9,
        "logit_bias": {5: -100},
        "stop_token_ids": (4,),
        "ignore_eos": True,
    }
    body = given | {"logprobs": 3, "logit_bias": {"5": -100}}
    assert params(**body) == SamplingParams(num_logprobs=3, **given)


def test_top_k_minus_one_is_off():
    assert params(top_k=-1).top_k == 0


def test_defaults_of_the_model_fill_what_is_not_given():
    config = {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "do_sample": True, "eos_token_id": [1]}
    defaults = SamplingDefaults.from_generation_config(config)
    got = params(defaults=defaults, top_p=0.5)
    assert (got.temperature, got.top_p, got.top_k, got.min_p) == (0.6, 0.5, 20, 0.0)
    assert params(defaults=defaults, temperature=0).temperature == 0


def test_seeds():
    assert params(seed=42).seed == 42
    assert params(seed=42, choice_index=1).seed == params(seed=42, choice_index=1).seed
    seeds = {params(seed=42, choice_index=i, n=8).seed for i in range(8)}
    assert len(seeds) == 8
    assert all(0 <= seed < 1 << 63 for seed in seeds | {params(seed=-1).seed, params().seed})
    assert params().seed != params().seed


@pytest.mark.parametrize("fields", [{"logit_bias": {"100": 1}}, {"stop_token_ids": [100]}])
def test_ids_beyond_the_vocabulary(fields: dict[str, object]):
    with pytest.raises(InvalidRequest, match="names token 100; the model's tokens are 0 to 99"):
        params(**fields)


def test_chat_logprobs():
    def num_logprobs(**fields) -> int | None:
        body = {"messages": [{"role": "user", "content": "x"}]} | fields
        return parse_chat(orjson.dumps(body)).num_logprobs

    assert num_logprobs() is None
    assert num_logprobs(logprobs=False) is None
    assert num_logprobs(logprobs=True) == 0
    assert num_logprobs(logprobs=True, top_logprobs=4) == 4


def test_the_choice_obeys_the_request(tokenizer: Tokenizer):
    request = parse_completion(b'{"prompt": "x", "stop": "b", "include_stop_str_in_output": true}')
    choice = to_choice_text(request, tokenizer, echo=tokenizer.encode("x", add_special_tokens=False))
    ids = tokenizer.encode("abc", add_special_tokens=False)
    assert choice.feed(TokenEvent(request_id="r", token_ids=ids)).text == "xab"
    request = parse_completion(b'{"prompt": "x", "detokenize": false}')
    assert to_choice_text(request, tokenizer).feed(TokenEvent(request_id="r", token_ids=ids)).text == ""
