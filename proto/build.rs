//! Generates the penstock.v1 messages and services from `penstock/v1/*.proto`; needs `protoc`.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let files = ["discovery", "fleet", "peers"].map(|name| format!("penstock/v1/{name}.proto"));
    tonic_prost_build::configure().compile_protos(&files, &[".".to_owned()])?;
    Ok(())
}
