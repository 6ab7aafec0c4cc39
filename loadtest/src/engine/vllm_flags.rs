//! vLLM's `serve` flags that mean nothing to a simulator: accepted, checked for their number of values, and ignored.
//!
//! From `vllm serve --help=all` of 0.32; the flags that do mean something are in [`super::args`]. An agent's command line
//! for a real engine must work here unchanged, and one with a typing error must fail here as it would there.

/// How many values a flag takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Arity {
    /// None; `--no-FLAG` exists too.
    Switch,
    /// One.
    One,
    /// All words up to the next flag.
    Many,
}

/// What vLLM's parser knows about `name` (without its dashes, words joined by `-`).
pub(super) fn arity(name: &str) -> Option<Arity> {
    // A nested setting: --compilation-config.mode 3.
    let name = name.split_once('.').map_or(name, |(head, _)| head);
    if ONE.contains(&name) {
        return Some(Arity::One);
    }
    if MANY.contains(&name) {
        return Some(Arity::Many);
    }
    let switch = name.strip_prefix("no-").unwrap_or(name);
    SWITCHES.contains(&switch).then_some(Arity::Switch)
}

const ONE: &[&str] = &[
    "additional-config",
    "aggregate-engine-logging",
    "all2all-backend",
    "allowed-headers",
    "allowed-local-media-path",
    "allowed-methods",
    "allowed-origins",
    "api-server-count",
    "asc",
    "attention-backend",
    "attention-config",
    "block-size",
    "cc",
    "chat-template",
    "chat-template-content-format",
    "code-revision",
    "compilation-config",
    "config",
    "config-format",
    "convert",
    "cp-kv-cache-interleave-size",
    "cpu-offload-gb",
    "cudagraph-metrics",
    "data-parallel-address",
    "data-parallel-backend",
    "data-parallel-rank",
    "data-parallel-rpc-port",
    "data-parallel-size",
    "data-parallel-size-local",
    "data-parallel-start-rank",
    "data-parallel-supervisor-port",
    "dbo-decode-token-threshold",
    "dbo-prefill-token-threshold",
    "dcp",
    "decode-context-parallel-size",
    "default-chat-template-kwargs",
    "device-ids",
    "distributed-executor-backend",
    "distributed-timeout-seconds",
    "dp",
    "dpa",
    "dpb",
    "dpl",
    "dpp",
    "dpr",
    "download-dir",
    "dtype",
    "ec-transfer-config",
    "eplb-config",
    "exclude-tools-when-tool-choice-none",
    "expert-placement-strategy",
    "fingerprint-mode",
    "generation-config",
    "gpu-memory-utilization",
    "grpc-port",
    "h11-max-header-count",
    "h11-max-incomplete-event-size",
    "hf-config-path",
    "hf-overrides",
    "hf-token",
    "io-processor-plugin",
    "kernel-config",
    "kv-cache-dtype",
    "kv-cache-memory-bytes",
    "kv-cache-metrics-sample",
    "kv-events-config",
    "kv-offloading-backend",
    "kv-offloading-size",
    "kv-sharing-fast",
    "kv-transfer-config",
    "limit-mm-per-prompt",
    "load-format",
    "log-config-file",
    "logits-processor-pattern",
    "logprobs-mode",
    "long-prefill-token-threshold",
    "lora-dtype",
    "mamba-block-size",
    "mamba-cache-dtype",
    "mamba-ssm-cache-dtype",
    "master-addr",
    "master-port",
    "max-cpu-loras",
    "max-cudagraph-capture-size",
    "max-log-len",
    "max-logprobs",
    "max-long-partial-prefills",
    "max-lora-rank",
    "max-loras",
    "max-num-active-seqs",
    "max-num-batched-tokens",
    "max-num-partial-prefills",
    "max-num-queued-tokens",
    "max-parallel-loading-workers",
    "max-seq-len-to-capture",
    "mm-encoder-attn-backend",
    "mm-encoder-tp-mode",
    "mm-processor-cache-gb",
    "mm-processor-cache-type",
    "mm-processor-kwargs",
    "mm-shm-cache-max-object-size-mb",
    "model-impl",
    "model-loader-extra-config",
    "moe-backend",
    "n",
    "nnodes",
    "node-rank",
    "numa-bind-nodes",
    "optimization-level",
    "otlp-traces-endpoint",
    "override-generation-config",
    "pipeline-parallel-size",
    "pooler-config",
    "pp",
    "prefill-context-parallel-size",
    "prefix-caching-hash-algo",
    "pt-load-map-location",
    "q",
    "quantization",
    "r",
    "ray-workers-use-nsight",
    "reasoning-config",
    "reasoning-parser",
    "reasoning-parser-plugin",
    "response-role",
    "revision",
    "root-path",
    "runner",
    "safetensors-load-strategy",
    "sc",
    "scheduler-cls",
    "scheduler-reserve-full-isl",
    "scheduling-policy",
    "show-hidden-metrics-for-version",
    "speculative-config",
    "ssl-ca-certs",
    "ssl-cert-reqs",
    "ssl-certfile",
    "ssl-ciphers",
    "ssl-keyfile",
    "stream-interval",
    "structured-outputs-config",
    "swap-space",
    "tensor-parallel-size",
    "tokenizer",
    "tokenizer-mode",
    "tokenizer-revision",
    "tool-call-parser",
    "tool-parser-plugin",
    "tool-server",
    "tp",
    "ubatch-size",
    "uvicorn-log-level",
    "video-pruning-rate",
    "weight-transfer-config",
    "worker-cls",
    "worker-extension-cls",
    "O",
    "sse-keep-alive-interval",
    "offload-backend",
    "pcp",
    "ep-size",
];

const MANY: &[&str] = &[
    "collect-detailed-traces",
    "cudagraph-capture-sizes",
    "default-mm-loras",
    "ignore-patterns",
    "logits-processors",
    "middleware",
    "override-attention-dtype",
    "profiler-config",
    "cudagraph-sizes",
];

const SWITCHES: &[&str] = &[
    "allow-credentials",
    "allow-deprecated-quantization",
    "async-scheduling",
    "calculate-kv-scales",
    "data-parallel-external-lb",
    "data-parallel-hybrid-lb",
    "dph",
    "disable-access-log-for-endpoints",
    "disable-cascade-attn",
    "disable-chunked-mm-input",
    "disable-custom-all-reduce",
    "disable-fastapi-docs",
    "disable-frontend-multiprocessing",
    "disable-hybrid-kv-cache-manager",
    "disable-log-requests",
    "disable-log-stats",
    "disable-nccl-for-dp-synchronization",
    "disable-sliding-window",
    "disable-uvicorn-access-log",
    "disable-uvicorn-metrics-access-log",
    "enable-chunked-prefill",
    "enable-dbo",
    "enable-elastic-ep",
    "enable-eplb",
    "enable-expert-parallel",
    "ep",
    "enable-fault-tolerance",
    "enable-kv-sharing-fast-prefill",
    "enable-layerwise-nvtx-tracing",
    "enable-log-deltas",
    "enable-log-outputs",
    "enable-log-requests",
    "enable-lora",
    "enable-lora-bias",
    "enable-mfu-metrics",
    "enable-mm-embeds",
    "enable-per-request-metrics",
    "enable-prefix-caching",
    "enable-prompt-embeds",
    "enable-return-routed-experts",
    "enable-scale-out",
    "enable-sleep-mode",
    "enable-ssl-refresh",
    "enable-tokenizer-info-endpoint",
    "enforce-eager",
    "fully-sharded-loras",
    "headless",
    "interleave-mm-strings",
    "kv-cache-metrics",
    "language-model-only",
    "log-error-stack",
    "multi-step-stream-outputs",
    "numa-bind",
    "return-tokens-as-token-ids",
    "skip-mm-profiling",
    "skip-tokenizer-init",
    "specialize-active-lora",
    "tokens-only",
    "trust-remote-code",
    "trust-request-chat-template",
    "use-tqdm-on-load",
    "tower-connector-lora",
    "enable-bs-cache",
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn knows_values_switches_and_their_opposites() {
        assert_eq!(arity("dtype"), Some(Arity::One));
        assert_eq!(arity("enforce-eager"), Some(Arity::Switch));
        assert_eq!(arity("no-enable-prefix-caching"), Some(Arity::Switch));
        assert_eq!(arity("compilation-config.mode"), Some(Arity::One));
        assert_eq!(arity("no-dtype"), None);
        assert_eq!(arity("tensor-paralel-size"), None);
    }

    #[test]
    fn names_are_unique() {
        let mut all: Vec<&str> = [ONE, MANY, SWITCHES].concat();
        let count = all.len();
        all.sort_unstable();
        all.dedup();
        assert_eq!(all.len(), count);
    }
}
