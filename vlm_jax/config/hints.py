"""Suggestions for names that do not exist."""

import difflib
from collections.abc import Iterable, Mapping

MOST_SUGGESTIONS = 4
PARTS = ("vision", "projector", "decoder", "cross_attention")
# Names of fields in other programs and in older versions.
SYNONYMS = {
    **dict.fromkeys(("lr", "max_lr", "peak_lr", "base_lr"), "optim.learning_rate"),
    **dict.fromkeys(("wd", "decay"), "optim.weight_decay"),
    **dict.fromkeys(("warmup", "warmup_ratio", "num_warmup_steps"), "optim.warmup_steps"),
    **dict.fromkeys(
        ("clip", "grad_clip", "max_grad_norm", "gradient_clip_val", "grad_norm"), "optim.clip_norm"
    ),
    **dict.fromkeys(("min_lr", "min_lr_ratio", "final_fraction"), "optim.final_lr_fraction"),
    **{f"rate_scale.{part}": f"optim.lr_mult.{part}" for part in PARTS},
    "rate_scale.gates": "optim.gate_lr_mult",
    "norm_order": "decoder.norm_position",
    "residual_scale": "decoder.layer_scale",
    "global_depth": "vision.num_global_layers",
    "tied_head": "decoder.tie_word_embeddings",
    "blind_rows": "fusion.tokens_without_image",
    **dict.fromkeys(("optimizer", "optim", "opt"), "optim.kind"),
    **dict.fromkeys(("lora_r", "lora_rank", "peft", "use_lora"), "lora.rank"),
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "use_rslora": "lora.rslora",
    **dict.fromkeys(("target_modules", "lora_target_modules", "lora_targets"), "lora.targets"),
    **dict.fromkeys(("lora_path", "adapter_path", "adapter_name_or_path"), "adapter"),
    **dict.fromkeys(
        ("load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type", "bits", "qlora", "quantization"),
        "train.frozen_dtype",
    ),
    **dict.fromkeys(
        ("bnb_4bit_use_double_quant", "double_quant", "use_double_quant"),
        "train.double_quantization",
    ),
    **dict.fromkeys(("freeze", "freeze_vision", "freeze_encoder"), "optim.lr_mult.vision"),
    **dict.fromkeys(
        ("freeze_decoder", "freeze_llm", "freeze_language_model"), "optim.lr_mult.decoder"
    ),
    **dict.fromkeys(
        (
            "batch",
            "bs",
            "batch_size",
            "global_batch_size",
            "train_batch_size",
            "per_device_train_batch_size",
        ),
        "train.batch_size",
    ),
    **dict.fromkeys(
        ("gradient_accumulation_steps", "grad_accum", "accumulate_grad_batches"),
        "train.microbatches",
    ),
    **dict.fromkeys(
        ("epoch", "epochs", "num_epochs", "num_train_epochs", "max_epochs"), "train.steps"
    ),
    **dict.fromkeys(
        (
            "max_steps",
            "num_steps",
            "total_steps",
            "train_steps",
            "num_train_steps",
            "iters",
            "iterations",
            "max_iters",
        ),
        "train.steps",
    ),
    **dict.fromkeys(
        ("dtype", "precision", "bf16", "fp16", "mixed_precision"), "train.compute_dtype"
    ),
    **dict.fromkeys(
        ("save_steps", "save_every", "ckpt_every", "checkpoint_every"),
        "train.checkpoint_every_steps",
    ),
    **dict.fromkeys(("save_total_limit", "max_checkpoints", "keep"), "train.keep_checkpoints"),
    **dict.fromkeys(
        ("logging_steps", "log_every", "log_steps", "log_interval"), "train.log_every_steps"
    ),
    **dict.fromkeys(
        ("output", "output_dir", "out", "out_dir", "save_dir", "logdir", "log_dir", "run_dir"),
        "workdir",
    ),
    **dict.fromkeys(("random_seed", "rng_seed"), "seed"),
    **dict.fromkeys(("data", "dataset", "dataset_name"), "data.source"),
    **dict.fromkeys(("data_path", "data_files", "train_file", "json"), "data.files"),
    **dict.fromkeys(("image_folder", "image_root", "images_dir"), "data.image_dir"),
    **dict.fromkeys(("data_dir", "cache_dir"), "data.dir"),
    **dict.fromkeys(("num_workers", "workers", "dataloader_num_workers"), "data.threads"),
    **dict.fromkeys(
        (
            "max_length",
            "max_seq_length",
            "max_seq_len",
            "model_max_length",
            "seq_len",
            "seq_length",
            "context_length",
        ),
        "data.text_length",
    ),
    **dict.fromkeys(("augmentation", "augmentations"), "data.augment"),
    **dict.fromkeys(("fusion", "fusion_type", "method"), "fusion.kind"),
    **dict.fromkeys(("gate", "gates"), "fusion.gated"),
    **dict.fromkeys(("projector", "connector", "mm_projector_type"), "projector.kind"),
    **dict.fromkeys(
        ("vision", "encoder", "vision_tower", "vision_model", "image_encoder"), "vision.checkpoint"
    ),
    **dict.fromkeys(("image_size", "img_size", "resolution"), "vision.image_size_px"),
    **dict.fromkeys(("patch", "patch_size"), "vision.patch_size_px"),
    **dict.fromkeys(
        ("native_resolution", "dynamic_resolution", "max_pixels", "max_num_patches"),
        "vision.max_patches",
    ),
    **dict.fromkeys(("decoder", "llm", "language_model", "text_model"), "decoder.checkpoint"),
    **dict.fromkeys(
        ("model", "model_name_or_path", "model_path", "pretrained", "finetune_from"), "init_from"
    ),
    **dict.fromkeys(("resume", "resume_from", "resume_from_checkpoint"), "workdir"),
    **dict.fromkeys(("hidden_size", "d_model", "dim", "n_embd", "embed_dim"), "decoder.width"),
    **dict.fromkeys(
        ("layers", "num_layers", "num_hidden_layers", "n_layer", "n_layers"), "decoder.depth"
    ),
    **dict.fromkeys(("num_heads", "n_head", "n_heads", "num_attention_heads"), "decoder.heads"),
    **dict.fromkeys(("intermediate_size", "mlp_dim", "ffn_dim"), "decoder.mlp_width"),
    **dict.fromkeys(("vocab", "vocabulary"), "decoder.vocab_size"),
    **dict.fromkeys(("gradient_checkpointing", "checkpointing", "rematerialize"), "decoder.remat"),
    **dict.fromkeys(("eval_batch_size", "per_device_eval_batch_size"), "eval.batch_size"),
    **dict.fromkeys(("eval", "eval_split", "test_split"), "eval.split"),
    **dict.fromkeys(("metric", "metrics", "compute_metrics"), "eval.metrics"),
    **dict.fromkeys(
        ("eval_steps", "eval_every", "eval_interval", "val_check_interval", "validate_every"),
        "eval.every_steps",
    ),
    **dict.fromkeys(("val_split", "validation_split", "val", "validation"), "eval.splits"),
    **dict.fromkeys(("metric_for_best_model", "monitor"), "train.best_metric"),
    **dict.fromkeys(("early_stopping", "early_stopping_patience"), "train.patience"),
    **dict.fromkeys(("report_to", "logger", "loggers", "tracker"), "train.trackers"),
    **dict.fromkeys(
        ("limit", "max_samples", "max_eval_samples", "eval_examples"), "eval.max_examples"
    ),
    **dict.fromkeys(("tp", "tensor_parallel", "tensor_parallel_size"), "mesh.tensor"),
    **dict.fromkeys(("dp", "data_parallel", "devices", "gpus"), "mesh.data"),
    **dict.fromkeys(("coordinator", "master_addr"), "distributed.coordinator_address"),
}


def nearest(word: str, choices: Iterable[str]) -> str:
    """' (perhaps you meant X)' where a choice is close to the word."""
    return suggestion(difflib.get_close_matches(word, list(choices), 1))


def nearest_field(name: str, fields: Iterable[str], synonyms: Mapping[str, str] = SYNONYMS) -> str:
    """`nearest` for a field `section.field` whose section or field may be wrong or missing."""
    name = name.lower().replace("-", "_")
    # Options are spelled with hyphens, which are compared as underscores.
    spellings = {field.replace("-", "_"): field for field in fields}
    fields = sorted(spellings, key=lambda field: field.count("."))
    section, _, last = name.rpartition(".")
    same_last = [field for field in fields if _last(field) == last]
    in_section = [field for field in fields if field.startswith(f"{section}.")]
    synonym = synonyms.get(last, "")
    # The first list that is not empty is suggested.
    candidates = (
        [field for field in same_last if field in in_section],
        [field for field in in_section if _last(field) == _last(synonym)],
        difflib.get_close_matches(name, fields, 1, cutoff=0.9) if section else [],
        [field for field in fields if field == synonym],
        same_last,
        [field for field in fields if f".{name}." in f".{field}"],
        [field for field in fields if _is_close(last, _last(field))][:1],
        difflib.get_close_matches(name, fields, 1),
    )
    suggested = next(filter(None, candidates), [])[:MOST_SUGGESTIONS]
    return suggestion([spellings[field] for field in suggested])


def _is_close(a: str, b: str) -> bool:
    return bool(difflib.get_close_matches(a, [b], 1, cutoff=0.85))


def _last(field: str) -> str:
    return field.rpartition(".")[2]


def suggestion(names: list[str]) -> str:
    """' (perhaps you meant A, B or C)'; empty without names."""
    return f" (perhaps you meant {either(names)})" if names else ""


def either(names: list[str]) -> str:
    """'A, B or C'."""
    *others, last = names
    return f"{', '.join(others)} or {last}" if others else last
