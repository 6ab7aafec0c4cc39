//! A node of its own: a network namespace joined to this one by a pair of interfaces, which can be cut off as by a power
//! failure: packets go out, and nothing ever comes back.
//!
//! Needs root and `ip` (iproute2). Where they are missing [`Node::new`] says why.

use std::{
    ffi::OsStr,
    process::{Command, Output},
};

/// A namespace with an address, and this machine's address on the way to it. Removed on drop.
pub(crate) struct Node {
    name: String,
    /// Where this machine is reached from there.
    pub(crate) here: String,
    /// Where the node is reached from here.
    pub(crate) there: String,
}

fn ip(words: &str) -> Result<(), String> {
    let output = Command::new("ip").args(words.split(' ')).output().map_err(|e| format!("ip: {e}"))?;
    match output {
        Output { status, .. } if status.success() => Ok(()),
        Output { stderr, .. } => Err(format!("ip {words}: {}", String::from_utf8_lossy(&stderr).trim())),
    }
}

impl Node {
    /// # Errors
    /// Why this machine does not permit it.
    pub(crate) fn new() -> Result<Self, String> {
        let number = std::process::id() % 16_384;
        let (high, low) = (number / 64, number % 64 * 4);
        let node = Self {
            name: format!("penstock-{}", std::process::id()),
            here: format!("10.217.{high}.{}", low + 1),
            there: format!("10.217.{high}.{}", low + 2),
        };
        let Self { name, here, there } = &node;
        // Interfaces have names of at most 15 bytes; they go with their namespace.
        let (near, far) = (format!("pk{}a", std::process::id()), format!("pk{}b", std::process::id()));
        ip(&format!("netns add {name}"))?;
        ip(&format!("link add {near} type veth peer name {far} netns {name}"))?;
        ip(&format!("addr add {here}/30 dev {near}"))?;
        ip(&format!("link set {near} up"))?;
        ip(&format!("-n {name} addr add {there}/30 dev {far}"))?;
        ip(&format!("-n {name} link set {far} up"))?;
        ip(&format!("-n {name} link set lo up"))?;
        Ok(node)
    }

    /// A command that runs there.
    pub(crate) fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.name]).arg(program);
        command
    }

    /// Power off: whatever is sent there vanishes, resets and refusals included.
    pub(crate) fn cut_off(&self) {
        // A host drops what is for an address it does not have.
        ip(&format!("-n {} addr flush to {}/32", self.name, self.there)).expect("cut off");
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if let Err(why) = ip(&format!("netns del {}", self.name)) {
            eprintln!("left behind: {why}");
        }
    }
}
