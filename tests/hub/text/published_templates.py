"""Chat templates with the output of the published ones, and the tokens that they need."""

from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedTokenizerFast

from tests.hub import tiny_tokenizers

START = "{% for m in messages %}"
END = "{% endfor %}"


class Published(NamedTuple):
    """A template, the special tokens of its tokenizer, and what it can write."""

    source: str
    specials: tuple[str, ...]  # the first is bos, the second ends an answer
    has_system: bool = True
    model_type: str = "llama"
    has_images: bool = False


def write(folder: Path, published: Published) -> PreTrainedTokenizerFast:
    """Writes the files of a checkpoint's text side; returns transformers' tokenizer of them."""
    bos, eos, *_ = published.specials
    tiny_tokenizers.byte_level(*published.specials).save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": False}
    settings |= {"bos_token": bos, "eos_token": eos, "chat_template": published.source}
    vision = {"model_type": "clip_vision_model", "patch_size": 7}
    tiny_tokenizers.write(
        folder,
        config={"model_type": published.model_type, "vision_config": vision},
        tokenizer_config=settings,
    )
    return PreTrainedTokenizerFast.from_pretrained(folder)


_LLAMA_3_CONTENT = (
    "{% if m.content is string %}{{ m.content | trim }}{% else %}{% for part in m.content %}"
    "{% if part.type == 'image' %}<|image|>{% else %}{{ part.text | trim }}{% endif %}"
    "{% endfor %}{% endif %}"
)


def _llama_3(content: str) -> str:
    return (
        f"{{{{ bos_token }}}}{START}<|start_header_id|>{{{{ m.role }}}}<|end_header_id|>\n\n"
        f"{content}<|eot_id|>{END}{{% if add_generation_prompt %}}"
        "<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
    )


def _chatml(answer: str) -> str:
    return (
        "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are a helpful assistant."
        "<|im_end|>\n{% endif %}"
        f"{START}<|im_start|>{{{{ m.role }}}}\n{{% if m.role == 'assistant' %}}{answer}"
        f"{{% else %}}{{{{ m.content }}}}<|im_end|>{{% endif %}}{{{{ '\\n' }}}}{END}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


_LLAMA_3_TOKENS = ("<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>")
_CHATML_TOKENS = ("<|endoftext|>", "<|im_end|>", "<|im_start|>")
PUBLISHED = {
    "llama 3": Published(_llama_3("{{ m.content | trim }}"), _LLAMA_3_TOKENS),
    "gemma": Published(
        "{{ bos_token }}{% if messages[0].role == 'system' %}"
        f"{{{{ raise_exception('System role not supported') }}}}{{% endif %}}{START}"
        "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
        f"{{{{ m.content | trim }}}}<end_of_turn>{{{{ '\\n' }}}}{END}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
        ("<bos>", "<end_of_turn>", "<start_of_turn>"),
        has_system=False,
        model_type="gemma",
    ),
    "qwen 2": Published(_chatml("{{ m.content }}<|im_end|>"), _CHATML_TOKENS),
    "with generation blocks": Published(
        _chatml("{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"), _CHATML_TOKENS
    ),
    "phi 3": Published(
        f"{START}<|{{{{ m.role }}}}|>\n{{{{ m.content }}}}<|end|>{{{{ '\\n' }}}}{END}"
        "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}",
        ("<s>", "<|endoftext|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"),
    ),
    "mistral": Published(
        "{{ bos_token }}{% set system = messages[0].content if messages[0].role == 'system' %}"
        f"{START}{{% if m.role == 'user' %}}[INST] {{% if system and loop.index0 == 1 %}}"
        "{{ system }}\n\n{% endif %}{{ m.content }} [/INST]"
        "{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}{% endif %}" + END,
        ("<s>", "</s>", "[INST]", "[/INST]"),
    ),
    "vicuna": Published(
        f"{{{{ bos_token }}}}{START}{{% if m.role == 'system' %}}{{{{ m.content }}}} "
        "{% elif m.role == 'user' %}USER: {{ m.content }} "
        f"{{% else %}}ASSISTANT: {{{{ m.content }}}}{{{{ eos_token }}}}{{% endif %}}{END}"
        "{% if add_generation_prompt %}ASSISTANT:{% endif %}",
        ("<s>", "</s>"),
    ),
    "llava": Published(
        f"{START}{{% if m.role != 'system' %}}{{{{ m.role.upper() + ': ' }}}}{{% endif %}}"
        "{% for part in m.content if part.type == 'image' %}{{ '<image>\n' }}{% endfor %}"
        "{% for part in m.content if part.type == 'text' %}{% if m.role == 'assistant' %}"
        "{% generation %}{{ part.text + ' ' }}{% endgeneration %}"
        f"{{% else %}}{{{{ part.text + ' ' }}}}{{% endif %}}{{% endfor %}}{END}"
        "{% if add_generation_prompt %}ASSISTANT:{% endif %}",
        ("<s>", "</s>", "<image>"),
        model_type="llava",
        has_images=True,
    ),
    "mllama": Published(
        _llama_3(_LLAMA_3_CONTENT),
        (*_LLAMA_3_TOKENS, "<|image|>"),
        model_type="mllama",
        has_images=True,
    ),
}
