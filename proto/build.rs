//! Generates the penstock.v1 messages and the Fleet service from `penstock/v1/*.proto`; needs `protoc`.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    tonic_prost_build::configure()
        .compile_protos(&["penstock/v1/discovery.proto", "penstock/v1/fleet.proto"], &["."])?;
    Ok(())
}
