//! How the program is linked.

fn main() {
    // Addresses that are put in at the start are listed in a few kilobytes instead of nearly one megabyte, all of which is read
    // then and stays resident. Needs glibc 2.36, of 2022.
    if std::env::var("CARGO_CFG_TARGET_ENV").as_deref() == Ok("gnu") {
        println!("cargo::rustc-link-arg-bins=-Wl,-z,pack-relative-relocs");
    }
    println!("cargo::rerun-if-changed=build.rs");
}
