use super::*;

fn found(exit: Exit, log: &str) -> Finding {
    let lines: Vec<String> = log.lines().map(str::to_owned).collect();
    decide(Evidence { exit, oom_killed: false, oom_nearby: false, lines: &lines })
}

/// What engines wrote, and what it means.
const GOLDEN: [(Cause, &str); 32] = [
    (
        Cause::GpuMemory,
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 112.00 MiB. GPU 0 has a total capacity of 79.11 GiB of \
         which 47.00 MiB is free. Process 1 has 78.06 GiB memory in use.\nRuntimeError: Engine core initialization failed. \
         See root cause above. Failed core proc(s): {}",
    ),
    (
        Cause::GpuMemory,
        "(EngineCore_DP0 pid=22866) ValueError: Free memory on device (3.27/23.64 GiB) on startup is less than desired GPU \
         memory utilization (0.9, 21.28 GiB). Decrease GPU memory utilization or reduce GPU memory used by other processes.",
    ),
    (
        Cause::GpuMemory,
        "ValueError: To serve at least one request with the models's max seq len (131072), (16.00 GiB KV cache is needed, which \
         is larger than the available KV cache memory (4.31 GiB).",
    ),
    (
        Cause::GpuMemory,
        "ValueError: No available memory for the cache blocks. Try increasing `gpu_memory_utilization`.",
    ),
    (
        Cause::GpuMemory,
        "RuntimeError: CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    ),
    (
        Cause::GpuMemory,
        "torch.AcceleratorError: CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported",
    ),
    (
        Cause::HostMemory,
        "RuntimeError: [enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to \
         allocate 42949672960 bytes. Error code 12 (Cannot allocate memory)",
    ),
    (Cause::HostMemory, "OSError: [Errno 12] Cannot allocate memory"),
    (Cause::HostMemory, "MemoryError"),
    (
        Cause::Space,
        "ERROR: Unexpected bus error encountered in worker. This might be caused by insufficient shared memory (shm).",
    ),
    (Cause::Space, "OSError: [Errno 28] No space left on device: '/models/huggingface/hub'"),
    (
        Cause::Port,
        "ERROR:    [Errno 98] error while attempting to bind on address ('0.0.0.0', 10814): address already in use",
    ),
    (Cause::Port, "error: cannot listen on 127.0.0.1:10814: Address already in use (os error 98)"),
    (Cause::Cuda, "RuntimeError: CUDA error: an illegal memory access was encountered"),
    (Cause::Cuda, "torch.AcceleratorError: CUDA error: uncorrectable ECC error encountered"),
    (Cause::Cuda, "RuntimeError: No CUDA GPUs are available"),
    (
        Cause::Cuda,
        "RuntimeError: Failed to infer device type, please set the environment variable `VLLM_LOGGING_LEVEL=DEBUG`",
    ),
    (
        Cause::Cuda,
        "torch.distributed.DistBackendError: NCCL error in: ProcessGroupNCCL.cpp:3356, unhandled cuda error\n\
         ncclUnhandledCudaError: Call to CUDA function failed.",
    ),
    (
        Cause::Arguments,
        "usage: vllm [-h] [-v] {chat,complete,serve,bench,collect-env,run-batch} ...\n\
         vllm: error: unrecognized arguments: --tensor-paralel-size 2",
    ),
    (
        Cause::Arguments,
        "vllm serve: error: argument --dtype: invalid choice: 'f16' (choose from 'auto', 'half')",
    ),
    (
        Cause::Arguments,
        "pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig\n  Value error, User-specified \
         max_model_len (200000) is greater than the derived max_model_len (max_position_embeddings=32768)",
    ),
    (
        Cause::Arguments,
        "ValueError: Total number of attention heads (32) must be divisible by tensor parallel size (3).",
    ),
    (
        Cause::Arguments,
        "error: unexpected argument '--no-such' found\n\nUsage: penstock-engine-sim serve [OPTIONS] <MODEL>",
    ),
    (
        Cause::Model,
        "OSError: /models/llama does not appear to have a file named config.json. Checkout 'https://huggingface.co//models/llama/main'",
    ),
    (
        Cause::Model,
        "pydantic_core._pydantic_core.ValidationError: 1 error\n  Value error, Invalid repository ID or local directory \
         specified: '/models/nowhere'.",
    ),
    (
        Cause::Model,
        "OSError: meta-llama/Llama-9 is not a local folder and is not a valid model identifier listed on 'https://huggingface.co/models'",
    ),
    (
        Cause::Model,
        "huggingface_hub.errors.GatedRepoError: 401 Client Error. Cannot access gated repo for url https://huggingface.co/x",
    ),
    (Cause::Model, "ValueError: Model architectures ['FooForCausalLM'] are not supported for now."),
    (Cause::Model, "RuntimeError: Cannot find any model weights with `/models/empty`"),
    (Cause::Installation, "ModuleNotFoundError: No module named 'vllm._C'"),
    (
        Cause::Installation,
        "ImportError: libcudart.so.12: cannot open shared object file: No such file or directory",
    ),
    (Cause::EngineCore, "vllm.v1.engine.exceptions.EngineDeadError: EngineCore encountered an issue."),
];

#[test]
fn what_engines_write_is_understood() {
    for (cause, log) in GOLDEN {
        let finding = found(Exit::Code(1), &format!("INFO 11-21 loading\n{log}\nsomething after it"));
        assert_eq!(finding.cause, cause, "{log}");
        assert!(finding.line.is_some_and(|line| log.contains(&line)), "{log}");
    }
}

#[test]
fn the_root_of_a_failure_wins_over_what_it_led_to() {
    let log = "torch.OutOfMemoryError: CUDA out of memory.\nINFO more\nRuntimeError: Engine core initialization failed. See \
               root cause above.\nOSError: [Errno 98] Address already in use";
    let finding = found(Exit::Code(1), log);
    assert_eq!(finding.cause, Cause::GpuMemory);
    assert_eq!(finding.line.as_deref(), Some("torch.OutOfMemoryError: CUDA out of memory."));
}

#[test]
fn the_status_decides_what_the_log_may_say() {
    let oom = "torch.OutOfMemoryError: CUDA out of memory.";
    let died = format!("{oom}\nvllm.v1.engine.exceptions.EngineDeadError: EngineCore encountered an issue.");
    for (exit, log, cause) in [
        (Exit::Code(0), "", Cause::Clean),
        // One request that did not fit is no end.
        (Exit::Code(0), oom, Cause::Clean),
        (Exit::Code(0), died.as_str(), Cause::GpuMemory),
        (Exit::Code(0), "EngineDeadError", Cause::EngineCore),
        (Exit::Signal(Signal::SIGTERM), oom, Cause::Signal(Signal::SIGTERM)),
        (Exit::Signal(Signal::SIGKILL), oom, Cause::Signal(Signal::SIGKILL)),
        (Exit::Signal(Signal::SIGABRT), "ncclSystemError: x", Cause::Cuda),
        (Exit::Signal(Signal::SIGABRT), "", Cause::Signal(Signal::SIGABRT)),
        (Exit::Signal(Signal::SIGBUS), "", Cause::Space),
        (Exit::Code(127), "sh: 1: vllm: not found", Cause::Program),
        (Exit::Code(3), "bye", Cause::Code(3)),
        (Exit::Unknown, "bye", Cause::Unknown),
        (Exit::Unknown, oom, Cause::GpuMemory),
    ] {
        assert_eq!(found(exit, log).cause, cause, "{exit}: {log}");
    }
}

#[test]
fn the_kernels_word_on_memory_is_believed_where_it_is_about_this_engine() {
    let decide =
        |exit, oom_killed, oom_nearby| decide(Evidence { exit, oom_killed, oom_nearby, lines: &[] }).cause;
    let killed = Exit::Signal(Signal::SIGKILL);
    assert_eq!(decide(killed, true, false), Cause::HostMemory);
    assert_eq!(decide(killed, false, true), Cause::HostMemory);
    assert_eq!(decide(Exit::Code(137), false, true), Cause::HostMemory);
    // A worker was killed, and the server went after it.
    assert_eq!(decide(Exit::Code(1), true, false), Cause::HostMemory);
    assert_eq!(decide(Exit::Code(1), false, true), Cause::Code(1));
    assert_eq!(decide(killed, false, false), Cause::Signal(Signal::SIGKILL));
}

#[test]
fn every_cause_has_its_label_and_says_what_to_do() {
    let all = [
        Cause::Clean,
        Cause::GpuMemory,
        Cause::HostMemory,
        Cause::Cuda,
        Cause::Space,
        Cause::Port,
        Cause::Model,
        Cause::Arguments,
        Cause::Program,
        Cause::Installation,
        Cause::EngineCore,
        Cause::Signal(Signal::SIGHUP),
        Cause::Code(4),
        Cause::Unknown,
    ];
    assert_eq!(all.map(Cause::label), Cause::LABELS);
    assert!(all.iter().all(|cause| !cause.advice().is_empty()));
    let hopeless: Vec<&str> =
        all.iter().filter(|cause| !cause.retry_helps()).map(|cause| cause.label()).collect();
    assert_eq!(hopeless, ["model", "arguments", "program", "installation"]);
    for (_, texts) in RULES {
        assert!(texts.iter().all(|text| *text == text.to_lowercase()));
    }
}
