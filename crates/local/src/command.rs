//! The command line of this room: `outrigger local …`, `outrigger bookinfo …`, `outrigger echo …`.

use std::{ffi::OsString, path::PathBuf, process::ExitCode, time::Duration};

use clap::{Args, Parser, Subcommand};

use crate::{
    error::Result, exec, logs, pod, pod::image::Images, ps, state::StateDir, supervisor, up,
};

/// Run a mesh on this machine: every pod a network namespace, from the YAML that a cluster would get.
#[derive(Debug, Parser)]
#[command(name = "outrigger local", disable_help_subcommand = true)]
struct Command {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Start the mesh of a folder of YAML and wait until its pods are ready. Edits of the folder take effect at once.
    Up {
        #[command(flatten)]
        mesh: MeshArgs,
        /// Seconds to wait until every pod is ready; 0 does not wait.
        #[arg(long, default_value_t = 180)]
        wait: u64,
    },
    /// End the mesh and remove everything it made.
    Down {
        #[command(flatten)]
        state: StateArgs,
    },
    /// Print pid, user, address and network namespace of every process.
    Ps {
        #[command(flatten)]
        state: StateArgs,
        #[arg(short, long)]
        namespace: Option<String>,
        /// `json` prints everything known as data.
        #[arg(short, long, value_parser = ["table", "json"], default_value = "table")]
        output: String,
    },
    /// Run a command in a container: `exec POD [-c CONTAINER] -- COMMAND …`.
    Exec {
        #[command(flatten)]
        state: StateArgs,
        #[arg(short, long)]
        namespace: Option<String>,
        #[arg(short, long)]
        container: Option<String>,
        /// Taken for kubectl's sake: input and terminal are always passed on.
        #[arg(short = 'i', long)]
        stdin: bool,
        /// See --stdin.
        #[arg(short = 't', long)]
        tty: bool,
        /// The pod: `reviews-v1`, `reviews-v1.default` or `deploy/reviews-v1`.
        pod: String,
        #[arg(required = true, trailing_var_arg = true)]
        command: Vec<String>,
    },
    /// Print what a container printed.
    Logs {
        #[command(flatten)]
        state: StateArgs,
        #[arg(short, long)]
        namespace: Option<String>,
        #[arg(short, long)]
        container: Option<String>,
        /// Only the last lines.
        #[arg(long)]
        tail: Option<usize>,
        /// Go on with new lines until interrupted.
        #[arg(short, long)]
        follow: bool,
        /// Of the process before the current one.
        #[arg(short, long)]
        previous: bool,
        pod: String,
        /// The container, as an alternative to -c.
        container_name: Option<String>,
    },
    /// The process behind a mesh; started by `up`.
    #[command(hide = true)]
    Supervise {
        #[command(flatten)]
        mesh: MeshArgs,
    },
    /// The process that holds a pod's namespaces; started by the supervisor.
    #[command(hide = true)]
    Hold { spec: PathBuf },
    /// The process that becomes a container; started by the supervisor.
    #[command(hide = true)]
    Run { spec: PathBuf },
}

#[derive(Args, Debug)]
struct StateArgs {
    /// The folder with everything of one mesh [default: $OUTRIGGER_STATE or /run/outrigger/local]
    #[arg(long)]
    state: Option<PathBuf>,
}

#[derive(Args, Debug)]
struct MeshArgs {
    /// A folder (or a file) of Kubernetes and Istio YAML.
    #[arg(short = 'f', long = "filename")]
    folder: PathBuf,
    #[command(flatten)]
    state: StateArgs,
    /// What an image stands for: NAME=COMMAND ARGUMENT … (may be repeated).
    #[arg(long = "image")]
    images: Vec<String>,
}

/// Runs `outrigger local`; `args[0]` is its own name.
pub fn main(args: Vec<OsString>) -> ExitCode {
    let command = match Command::try_parse_from(args) {
        Ok(command) => command,
        Err(e) => e.exit(),
    };
    match run(command.action) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("outrigger local: {e}");
            ExitCode::FAILURE
        }
    }
}

fn run(action: Action) -> Result<()> {
    let state = |args: StateArgs| StateDir::new(args.state);
    match action {
        Action::Up { mesh, wait } => {
            let state = state(mesh.state);
            up::up(
                &mesh.folder,
                &state,
                &mesh.images,
                Duration::from_secs(wait),
            )?;
            print!("{}", ps::table(&state.status()?, None));
            Ok(())
        }
        Action::Down { state: s } => up::down(&state(s)),
        Action::Ps {
            state: s,
            namespace,
            output,
        } => {
            let state = state(s);
            let status = state.status()?;
            if !up::is_alive(&status) {
                return Err(crate::Error::Usage(format!(
                    "the mesh in {} has ended by itself (see {}): `outrigger local down` clears it away",
                    state.root().display(),
                    state.supervisor_log().display()
                )));
            }
            if output == "json" {
                println!("{:#}", ps::as_json(&status, namespace.as_deref()));
            } else {
                print!("{}", ps::table(&status, namespace.as_deref()));
            }
            Ok(())
        }
        Action::Exec {
            state: s,
            namespace,
            container,
            pod,
            command,
            ..
        } => exec::exec(
            &state(s),
            &pod,
            namespace.as_deref(),
            container.as_deref(),
            command,
        ),
        Action::Logs {
            state: s,
            namespace,
            container,
            tail,
            follow,
            previous,
            pod,
            container_name,
        } => {
            let view = logs::View {
                tail,
                follow,
                previous,
            };
            let container = container.or(container_name);
            logs::logs(
                &state(s),
                &pod,
                namespace.as_deref(),
                container.as_deref(),
                view,
            )
        }
        Action::Supervise { mesh } => {
            let mut images = Images::default();
            for image in &mesh.images {
                images.add(image).map_err(crate::Error::Usage)?;
            }
            supervisor::supervise(&mesh.folder, &state(mesh.state), images)
        }
        Action::Hold { spec } => pod::hold::hold(&spec),
        Action::Run { spec } => pod::run::run(&spec),
    }
}
