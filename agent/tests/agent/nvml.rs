//! The fake of NVIDIA's library, compiled once per kind, and a copy of it with a script of its own.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

/// Two GPUs with every figure, linked with each other; the second is not divided.
pub(crate) const TWO: &str = "\
gpus=2
0.utilization=37\n0.temperature=41\n0.shutdown=95\n0.slowdown=90\n0.power=123456\n0.power_limit=700000
0.sm_clock=1980\n0.memory_clock=2619\n0.throttle=4\n0.corrected=3\n0.uncorrected=0\n0.corrected_ever=17
0.uncorrected_ever=0\n0.remap_pending=0\n0.remap_failed=0\n0.recovery=0\n0.replays=5\n0.mig=0\n0.nvlink=1
1.utilization=0\n1.temperature=40\n1.nvlink=1
";

/// A library beside the test's own files, whose script may be changed at any time.
pub(crate) struct Fake {
    library: PathBuf,
}

impl Fake {
    /// `cfg`: "", "old" or "ancient". The library is not there before [`Fake::install`].
    pub(crate) fn new(dir: &Path, cfg: &str) -> Self {
        let fake = Self { library: dir.join("libfake-nvml.so") };
        fake.script(TWO);
        fs::copy(compiled(cfg), fake.library.with_extension("ready")).unwrap();
        fake
    }

    /// Puts the library where the agent looks for it.
    pub(crate) fn install(&self) {
        fs::rename(self.library.with_extension("ready"), &self.library).unwrap();
    }

    pub(crate) fn path(&self) -> String {
        self.library.to_str().unwrap().to_owned()
    }

    fn beside(&self, what: &str) -> PathBuf {
        PathBuf::from(format!("{}.{what}", self.library.display()))
    }

    /// Replaces the script.
    pub(crate) fn script(&self, text: &str) {
        let new = self.beside("new");
        fs::write(&new, text).unwrap();
        fs::rename(new, self.beside("script")).unwrap();
    }

    /// Two GPUs, and these lines on top.
    pub(crate) fn with(&self, lines: &str) {
        self.script(&format!("{TWO}\n{lines}\n"));
    }

    /// What it was called for at its beginning and end, in order.
    pub(crate) fn calls(&self) -> Vec<String> {
        let text = fs::read_to_string(self.beside("calls")).unwrap_or_default();
        text.lines().map(str::to_owned).collect()
    }
}

/// The compiled library; made once for all tests, by rename, so that none sees half of one.
fn compiled(cfg: &str) -> PathBuf {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/agent/fake_nvml.rs");
    let changed = fs::metadata(&source).unwrap().modified().unwrap();
    let stamp = changed.duration_since(std::time::UNIX_EPOCH).unwrap().as_nanos();
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let library = dir.join(format!("fake-nvml-{stamp}-{cfg}.so"));
    if library.exists() {
        return library;
    }
    let own = dir.join(format!("fake-nvml-{}.so", std::process::id()));
    let mut command = Command::new(std::env::var("RUSTC").unwrap_or_else(|_| "rustc".into()));
    command.args(["--edition", "2021", "--crate-type", "cdylib", "--crate-name", "fake_nvml"]);
    let kinds: &[&str] = match cfg {
        "ancient" => &["old", "ancient"],
        "old" => &["old"],
        _ => &[],
    };
    for kind in kinds {
        command.args(["--cfg", kind]);
    }
    let output = command.arg("-o").arg(&own).arg(source).output().expect("rustc runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    fs::rename(own, &library).unwrap();
    library
}
