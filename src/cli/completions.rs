//! `write-api completions`: what a shell needs to complete this command line.

use clap::{Args, Command};
use clap_complete::Shell;

pub(super) const HELP: &str = "\
Needs: nothing.

Examples:
  source <(write-api completions bash)                                      bash, this session
  write-api completions bash > /etc/bash_completion.d/write-api             bash, everybody
  write-api completions zsh > \"${fpath[1]}/_write-api\"                      zsh
  write-api completions fish > ~/.config/fish/completions/write-api.fish    fish

Exit codes: 0 done, 64 wrong usage.";

/// For which shell.
#[derive(Debug, Args)]
pub(super) struct Options {
    /// The shell.
    shell: Shell,
}

/// The script.
pub(super) fn run(options: &Options, mut command: Command) -> Vec<u8> {
    let mut script = Vec::new();
    clap_complete::generate(options.shell, &mut command, "write-api", &mut script);
    if options.shell == Shell::Bash {
        // The generator goes from label to label by one spelling of a program's hyphen and names the labels by another,
        // so that no verb's options are completed (clap-rs/clap#6421). Nothing is replaced once that is mended.
        let text = String::from_utf8(script).expect("a script is UTF-8");
        script = text.replace("write__subcmd__api", "write__api").into_bytes();
    }
    script
}
