fn main() -> std::process::ExitCode {
    penstock_loadtest::load::main(std::env::args_os())
}
