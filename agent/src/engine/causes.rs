//! Why an engine ended: one of a closed list, from its exit status, what the kernel counted, and what it wrote last.
//!
//! Pure. The texts are those that vLLM, torch, CUDA, NCCL, Hugging Face's libraries, Python and our simulator write. An
//! engine's log has the root of a failure first and ever more general errors after it ("Engine core initialization failed.
//! See root cause above"), so what counts is not the last line but the most telling one: rules are asked in order, each of
//! all lines.

use nix::sys::signal::Signal;

use super::process::Exit;

/// Why an engine ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Cause {
    /// It returned 0, unasked.
    Clean,
    /// A GPU's memory was too small, or in use.
    GpuMemory,
    /// The kernel ended it for want of memory, or it could get none.
    HostMemory,
    /// A GPU, its driver or the communication between GPUs failed.
    Cuda,
    /// No memory shared between processes, or no disk space, was left.
    Space,
    /// Its port was taken.
    Port,
    /// The model is not there, or cannot be served.
    Model,
    /// It was given arguments that it does not take, or that do not fit the model or the GPUs.
    Arguments,
    /// Its program cannot be executed.
    Program,
    /// Its program lacks a part of itself.
    Installation,
    /// Its engine core died, and nothing says why.
    EngineCore,
    /// A signal ended it, which this agent did not send.
    Signal(Signal),
    /// It returned this code, and nothing says why.
    Code(i32),
    /// It ended while no agent could learn how.
    Unknown,
}

impl Cause {
    /// Every label.
    pub(crate) const LABELS: [&str; 14] = [
        "clean",
        "gpu_memory",
        "host_memory",
        "cuda",
        "space",
        "port",
        "model",
        "arguments",
        "program",
        "installation",
        "engine_core",
        "signal",
        "code",
        "unknown",
    ];

    /// Lower-case name: label of the metric, value in reports and JSON.
    pub(crate) fn label(self) -> &'static str {
        match self {
            Self::Clean => "clean",
            Self::GpuMemory => "gpu_memory",
            Self::HostMemory => "host_memory",
            Self::Cuda => "cuda",
            Self::Space => "space",
            Self::Port => "port",
            Self::Model => "model",
            Self::Arguments => "arguments",
            Self::Program => "program",
            Self::Installation => "installation",
            Self::EngineCore => "engine_core",
            Self::Signal(_) => "signal",
            Self::Code(_) => "code",
            Self::Unknown => "unknown",
        }
    }

    /// Whether the same start again may go well. Where it may not, the engine is given up here at once.
    pub(crate) fn retry_helps(self) -> bool {
        !matches!(self, Self::Model | Self::Arguments | Self::Program | Self::Installation)
    }

    /// In words, where the exit itself does not say it.
    pub(crate) fn words(self) -> Option<&'static str> {
        Some(match self {
            Self::GpuMemory => "a GPU had too little free memory",
            Self::HostMemory => "the machine, or its memory limit, had too little free memory",
            Self::Cuda => "a GPU, its driver or the communication between GPUs failed",
            Self::Space => "no disk space or shared memory was left",
            Self::Port => "its port was taken; the next start takes another",
            Self::Model => "its model is not there or cannot be served",
            Self::Arguments => "it does not accept its arguments",
            Self::Program => "its program cannot be executed",
            Self::Installation => "a part of its installation is missing",
            Self::EngineCore => "its engine core died",
            Self::Clean | Self::Signal(_) | Self::Code(_) | Self::Unknown => return None,
        })
    }

    /// What the operator can do.
    pub(crate) fn advice(self) -> &'static str {
        match self {
            Self::Clean => "something asked it to end: look in its log for who did",
            Self::GpuMemory => {
                "lower --gpu-memory-utilization or --max-model-len, use more GPUs (--tensor-parallel-size), or see who else \
                 holds the GPU's memory (`penstock describe node`)"
            }
            Self::HostMemory => {
                "give the engine more memory (engines.memory_max_mib, the node's or container's limit), or lower its CPU \
                 offload and KV cache space"
            }
            Self::Cuda => {
                "look at the GPU (`penstock describe node`, nvidia-smi, the kernel's log for Xid); one that fails again \
                 belongs out of use"
            }
            Self::Space => {
                "free disk space, or give the container more shared memory (--shm-size, a larger /dev/shm)"
            }
            Self::Port => "nothing: the next start takes another port",
            Self::Model => {
                "check model_path: the folder must be on the node, or the id be known to the hub and the token allowed to read \
                 it; and that this version of the engine serves the architecture"
            }
            Self::Arguments => {
                "mend the deployment's args or engine settings: the last lines name what is not accepted"
            }
            Self::Program => {
                "install the program on the node, or name its path in the agent's engines.NAME.command"
            }
            Self::Installation => {
                "mend the engine's installation on the node: a module or library of it is missing"
            }
            Self::EngineCore => {
                "read the engine's log from the first error on (`penstock logs MODEL/REPLICA --previous`)"
            }
            Self::Signal(_) => "find out who sent the signal: an operator, a service manager, or the kernel",
            Self::Code(_) | Self::Unknown => {
                "read the engine's log (`penstock logs MODEL/REPLICA --previous`)"
            }
        }
    }
}

/// What is known of an end.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Evidence<'a> {
    /// How the main process ended.
    pub(crate) exit: Exit,
    /// The kernel has ended a process of this very engine for want of memory.
    pub(crate) oom_killed: bool,
    /// It has ended some process of this machine for it a moment ago.
    pub(crate) oom_nearby: bool,
    /// What the engine wrote last, oldest first.
    pub(crate) lines: &'a [String],
}

/// What was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Finding {
    /// Why.
    pub(crate) cause: Cause,
    /// The line of the log that says so.
    pub(crate) line: Option<String>,
}

/// Decides.
pub(crate) fn decide(evidence: Evidence<'_>) -> Finding {
    let plain = |cause| Finding { cause, line: None };
    let killed = matches!(evidence.exit, Exit::Signal(Signal::SIGKILL) | Exit::Code(137));
    if evidence.oom_killed || (killed && evidence.oom_nearby) {
        return plain(Cause::HostMemory);
    }
    let written = || said(evidence.lines).map(|(cause, line)| Finding { cause, line: Some(line.to_owned()) });
    match evidence.exit {
        // A server that ends because its core has died ends in good order; one that was asked to end does so as well.
        Exit::Code(0) if core_died(evidence.lines) => written().unwrap_or_else(|| plain(Cause::EngineCore)),
        Exit::Code(0) => plain(Cause::Clean),
        // Those that a failure itself leads to; the others come from outside, whatever the log says.
        Exit::Signal(signal @ (Signal::SIGABRT | Signal::SIGSEGV | Signal::SIGBUS | Signal::SIGILL)) => {
            let space = (signal == Signal::SIGBUS).then(|| plain(Cause::Space));
            written().or(space).unwrap_or_else(|| plain(Cause::Signal(signal)))
        }
        Exit::Signal(signal) => plain(Cause::Signal(signal)),
        // What shells and vLLM's command line return for a program that is not there or cannot be run.
        Exit::Code(code @ (126 | 127)) => written().unwrap_or_else(|| Finding {
            cause: Cause::Program,
            line: evidence.lines.last().cloned().filter(|_| code > 0),
        }),
        Exit::Code(code) => written().unwrap_or_else(|| plain(Cause::Code(code))),
        Exit::Unknown => written().unwrap_or_else(|| plain(Cause::Unknown)),
    }
}

fn core_died(lines: &[String]) -> bool {
    let marks = [
        "EngineDeadError",
        "EngineCore encountered",
        "Engine core proc",
        "Engine core initialization failed",
    ];
    lines.iter().any(|line| marks.iter().any(|mark| line.contains(mark)))
}

/// What the engine itself says: the first rule that holds of any line, and the last such line.
fn said(lines: &[String]) -> Option<(Cause, &str)> {
    let lower: Vec<String> = lines.iter().map(|line| line.to_lowercase()).collect();
    RULES.iter().find_map(|(cause, texts)| {
        let at = lower.iter().rposition(|line| texts.iter().any(|text| line.contains(text)))?;
        Some((*cause, lines.get(at)?.as_str()))
    })
}

/// Lower-case texts. Earlier rules win: a cause before what it leads to, the particular before the general.
const RULES: [(Cause, &[&str]); 11] = [
    (
        Cause::GpuMemory,
        &[
            "cuda out of memory",
            "hip out of memory",
            "xpu out of memory",
            "cuda error: out of memory",
            "cuda driver error: out of memory",
            "torch.outofmemoryerror",
            "torch.cuda.outofmemoryerror",
            "cudaerrormemoryallocation",
            "cublas_status_alloc_failed",
            "cudnn_status_alloc_failed",
            "no available memory for the cache blocks",
            "is less than desired gpu memory utilization",
            "larger than the available kv cache memory",
            "larger than the maximum number of tokens that can be stored in kv cache",
            "error in memory profiling",
        ],
    ),
    (
        Cause::HostMemory,
        &[
            "defaultcpuallocator: can't allocate memory",
            "defaultcpuallocator: not enough memory",
            "cannot allocate memory",
            "std::bad_alloc",
            "memoryerror",
            "memory allocation of ",
            "out of memory: killed process",
            "not enough available memory for the kv cache",
        ],
    ),
    (
        Cause::Space,
        &[
            "no space left on device",
            "unable to allocate shared memory",
            "insufficient shared memory",
            "disk quota exceeded",
            "bus error",
        ],
    ),
    (Cause::Port, &["address already in use", "errno 98"]),
    (
        Cause::Cuda,
        &[
            "cuda error:",
            "cuda driver error",
            "cuda driver initialization failed",
            "cuda initialization:",
            "cuda-capable device",
            "no cuda gpus are available",
            "nvidia driver on your system is too old",
            "found no nvidia driver",
            "driver/library version mismatch",
            "failed to infer device type",
            "cudaerror",
            "uncorrectable ecc error",
            "device-side assert",
            "illegal memory access",
            "nccl error",
            "ncclunhandledcudaerror",
            "ncclsystemerror",
            "ncclinternalerror",
            "ncclremoteerror",
            "cublas_status_",
            "cudnn_status_",
            "hip error:",
        ],
    ),
    (
        Cause::Arguments,
        &[
            "error: unrecognized arguments",
            "error: argument -",
            "error: the following arguments are required",
            "error: ambiguous option",
            "error: unexpected argument",
            "error: invalid value",
            "error: the argument '",
            "error: the following required arguments",
            "error: a value is required",
            "validation error for modelconfig",
            "validation error for vllmconfig",
            "validation error for parallelconfig",
            "validation error for cacheconfig",
            "validation error for schedulerconfig",
            "validation error for loraconfig",
            "validation errors for ",
            "user-specified max_model_len",
            "must be divisible by tensor parallel size",
            "is larger than the number of available gpus",
            "is larger than the number of gpus",
            "is not supported on current platform",
            "is only supported on gpus with compute capability",
            "unknown quantization method",
            "unrecognized configuration class",
        ],
    ),
    (
        Cause::Model,
        &[
            "does not appear to have a file named",
            "can't load the configuration of",
            "can't load tokenizer for",
            "can't load the model for",
            "is not a local folder and is not a valid model identifier",
            "invalid repository id or local directory",
            "repository not found for url",
            "repositorynotfounderror",
            "gatedrepoerror",
            "access to model",
            "you are trying to access a gated repo",
            "repo id must",
            "hfvalidationerror",
            "incorrect path_or_model_id",
            "localentrynotfounderror",
            "offlinemodeisenabled",
            "couldn't connect to 'https://huggingface.co'",
            "cannot find any model weights",
            "no safetensors weights found",
            "error while deserializing header",
            "are not supported for now",
            "does not recognize this architecture",
            "has no vllm implementation",
            "model path does not exist",
            "no such model",
        ],
    ),
    (
        Cause::Installation,
        &[
            "modulenotfounderror",
            "no module named",
            "cannot open shared object file",
            "undefined symbol",
            "importerror",
            "packagenotfounderror",
        ],
    ),
    (Cause::Model, &["no such file or directory", "filenotfounderror"]),
    (Cause::Arguments, &["usage: vllm", "usage: penstock", "valueerror:", "error: unknown"]),
    (Cause::EngineCore, &["enginedeaderror", "engine core initialization failed", "engine core proc"]),
];

#[cfg(test)]
#[path = "causes_tests.rs"]
mod tests;
