#!/usr/bin/env bash
# Coverage-guided tests (libFuzzer) of the code that reads bytes from outside: FUZZ_SECONDS (60) for each target.
#
#   scripts/fuzz.sh [TARGET]...      request, events, usage, answers: all by default
#
# Needs a C++ compiler, and no nightly Rust: the instrumentation is LLVM's own pass, without a sanitizer. Inputs that reach new
# code are kept in target/fuzz-corpus; those in fuzz/corpus are the committed seeds, which proxy/tests/corpus.rs runs as well.
# What breaks a property is written to target/fuzz-artifacts and printed with the command that repeats it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

targets=("$@")
[ $# -gt 0 ] || targets=(request events usage answers)
seconds=${FUZZ_SECONDS:-60}
host=$(rustc -vV | sed -n 's/^host: //p')
target_dir=${CARGO_TARGET_DIR:-$PWD/target}
# The versions that ship; what only fuzzing needs is added to the copy.
cp Cargo.lock fuzz/Cargo.lock

flags=(
    -Cpasses=sancov-module
    -Cllvm-args=-sanitizer-coverage-level=4
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters
    -Cllvm-args=-sanitizer-coverage-pc-table
    -Cllvm-args=-sanitizer-coverage-trace-compares
    --cfg fuzzing
)
# --target: without it the flags would go to build scripts and macros too, which cannot be linked with them.
RUSTFLAGS="${flags[*]}" cargo build --quiet --release --manifest-path fuzz/Cargo.toml \
    --target "$host" --target-dir "$target_dir/fuzz" "${targets[@]/#/--bin=}"

for target in "${targets[@]}"; do
    corpus=$target_dir/fuzz-corpus/$target
    artifacts=$target_dir/fuzz-artifacts/$target/
    mkdir -p "$corpus" "$artifacts"
    echo "--- $target, $seconds s"
    "$target_dir/fuzz/$host/release/$target" "$corpus" "fuzz/corpus/$target" -artifact_prefix="$artifacts" \
        -max_total_time="$seconds" -max_len=8192 -timeout=10 -rss_limit_mb=2048 -print_final_stats=1 -verbosity=1 \
        2>&1 | grep -vE '^#[0-9]+\s+(NEW|REDUCE|pulse)' || {
        echo "fuzz: $target failed; what did it is in $artifacts" >&2
        exit 1
    }
done
