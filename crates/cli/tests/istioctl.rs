//! `proxy-config -f` against what a real istioctl printed: tables byte for byte, JSON and YAML as data.

#[path = "../../testkit/src/conformance.rs"]
mod finder;

use std::{fs, process::Command};

use serde_json::Value;

#[test]
fn proxy_config_prints_what_istioctl_prints() {
    let Some(root) = finder::conformance("istioctl") else {
        return;
    };
    let mut checked = 0;
    let mut wrong = Vec::new();
    for dump in fs::read_dir(root)
        .unwrap()
        .flatten()
        .filter(|e| e.path().is_dir())
    {
        let dir = dump.path();
        let commands = fs::read(dir.join("commands.json")).unwrap();
        let commands: Value = serde_json::from_slice(&commands).unwrap();
        for (name, command) in commands.as_object().unwrap() {
            let args = command["args"]
                .as_array()
                .unwrap()
                .iter()
                .map(|a| a.as_str().unwrap());
            let out = Command::new(env!("CARGO_BIN_EXE_outrigger"))
                .arg("proxy-config")
                .args(args)
                .arg("-f")
                .arg(dir.join("config_dump.json"))
                .output()
                .unwrap();
            let got = String::from_utf8(out.stdout).unwrap();
            let want = fs::read_to_string(dir.join(format!("{name}.out"))).unwrap();
            let equal = match (data(&want, name), data(&got, name)) {
                (Some(want), Some(got)) => want == got,
                _ => want == got,
            };
            if !equal || out.status.code() != command["rc"].as_i64().map(|c| c as i32) {
                let line = want.lines().zip(got.lines()).find(|(w, g)| w != g);
                wrong.push(format!(
                    "{}/{name}: {line:?} {}",
                    dir.file_name().unwrap().display(),
                    String::from_utf8_lossy(&out.stderr)
                ));
            }
            checked += 1;
        }
    }
    assert!(
        wrong.is_empty(),
        "{} of {checked} differ:\n{}",
        wrong.len(),
        wrong.join("\n")
    );
    assert!(checked > 50, "only {checked} commands");
}

fn data(text: &str, name: &str) -> Option<Value> {
    if name.ends_with("-json") {
        return serde_json::from_str(text).ok();
    }
    name.ends_with("-yaml")
        .then(|| proto::json::yaml_to_value(text).ok())
        .flatten()
}
