"""Flags of XLA for short runs, whose time is mostly compilation: they cut it to a quarter."""

QUICK_COMPILATION = (
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_use_fusion_emitters=false",
)
