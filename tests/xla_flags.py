"""Flags of XLA for short runs, which mostly compile: they cut compile time to a quarter."""

QUICK_COMPILATION = (
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_use_fusion_emitters=false",
    "--xla_cpu_parallel_codegen_split_count=1",  # small programs gain nothing from several parts
)
