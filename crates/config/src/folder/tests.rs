use std::os::unix::fs::symlink;

use tempfile::TempDir;

use super::*;
use crate::Kind;

fn service(name: &str, port: u16) -> String {
    format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}}}\nspec:\n  ports:\n  - port: {port}\n"
    )
}

fn route(name: &str, timeout: &str) -> String {
    format!(
        "apiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata:\n  name: {name}\nspec:\n  hosts: [{name}]\n  http:\n  - timeout: {timeout}\n    route:\n    - destination: {{host: {name}}}\n"
    )
}

fn port(folder: &Folder, name: &str) -> Option<u16> {
    Some(
        folder
            .snapshot()
            .services
            .get("default", name)?
            .spec
            .spec
            .ports[0]
            .port,
    )
}

fn timeout(folder: &Folder, name: &str) -> i64 {
    let object = folder
        .snapshot()
        .virtual_services
        .get("default", name)
        .unwrap();
    object.spec.http[0].timeout.unwrap().seconds
}

fn shown(folder: &Folder) -> Vec<String> {
    folder.problems().iter().map(ToString::to_string).collect()
}

fn names(update: &Update) -> Vec<String> {
    update.changed.iter().map(ToString::to_string).collect()
}

fn write(dir: &TempDir, name: &str, text: &str) {
    let path = dir.path().join(name);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, text).unwrap();
}

#[test]
fn a_folder_is_read_with_its_subfolders_and_only_its_own_files() {
    let dir = TempDir::new().unwrap();
    write(
        &dir,
        "a.yaml",
        &format!("{}---\n{}", service("a", 80), service("b", 81)),
    );
    write(
        &dir,
        "deep/er/c.json",
        r#"{"apiVersion": "v1", "kind": "List", "items": [{"apiVersion": "v1", "kind": "Service", "metadata": {"name": "c"}, "spec": {"ports": [{"port": 82}]}}]}"#,
    );
    write(
        &dir,
        "deploy.yml",
        "apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: d}\n",
    );
    write(&dir, ".hidden.yaml", &service("hidden", 1));
    write(&dir, "notes.txt", "not: [yaml");
    let folder = Folder::open(dir.path()).unwrap();
    assert_eq!(
        (port(&folder, "a"), port(&folder, "b"), port(&folder, "c")),
        (Some(80), Some(81), Some(82))
    );
    assert_eq!(folder.snapshot().services.len(), 3);
    assert_eq!(shown(&folder), [] as [String; 0]);
    assert!(Folder::open(dir.path().join("nowhere")).is_err());
}

#[test]
fn a_change_names_what_changed_and_shares_the_rest() {
    let dir = TempDir::new().unwrap();
    write(
        &dir,
        "a.yaml",
        &format!("{}---\n{}", service("a", 80), service("b", 81)),
    );
    write(&dir, "r.yaml", &route("a", "1s"));
    let mut folder = Folder::open(dir.path()).unwrap();
    let before = folder.snapshot().clone();
    assert!(folder.reload().update.is_none());
    write(
        &dir,
        "a.yaml",
        &format!("{}---\n{}", service("a", 80), service("b", 8181)),
    );
    let update = folder.reload().update.unwrap();
    assert_eq!(names(&update), ["Service default/b"]);
    let a = |s: &Snapshot| s.services.get("default", "a").unwrap().clone();
    assert!(Arc::ptr_eq(&a(&before), &a(&update.snapshot)));
    assert!(
        before
            .virtual_services
            .same(&update.snapshot.virtual_services)
    );
    assert!(!before.services.same(&update.snapshot.services));
    // Moved within its file, with nothing else: no change, but the new line is known.
    write(
        &dir,
        "a.yaml",
        &format!("# moved\n{}---\n{}", service("a", 80), service("b", 8181)),
    );
    let update = folder.reload().update.unwrap();
    assert!(update.changed.is_empty());
    assert_eq!(
        update
            .snapshot
            .services
            .get("default", "a")
            .unwrap()
            .source
            .line,
        2
    );
    fs::remove_file(dir.path().join("a.yaml")).unwrap();
    assert_eq!(folder.reload().update.unwrap().changed.len(), 2);
    assert_eq!(folder.snapshot().services.len(), 0);
}

#[test]
fn what_goes_bad_leaves_the_last_good_version_and_says_where() {
    let dir = TempDir::new().unwrap();
    write(&dir, "a.yaml", &service("a", 80));
    write(
        &dir,
        "r.yaml",
        &format!("{}---\n{}", route("one", "1s"), route("two", "2s")),
    );
    let mut folder = Folder::open(dir.path()).unwrap();

    // A wrong field: the object stays as it was, its neighbour changes.
    write(
        &dir,
        "r.yaml",
        &format!("{}---\n{}", route("one", "soon"), route("two", "3s")),
    );
    let update = folder.reload().update.unwrap();
    assert_eq!(names(&update), ["VirtualService default/two"]);
    assert_eq!((timeout(&folder, "one"), timeout(&folder, "two")), (1, 3));
    let [problem] = &shown(&folder)[..] else {
        panic!("{:?}", shown(&folder))
    };
    assert!(
        problem.contains("r.yaml:8: VirtualService default/one: spec.http[0].timeout: "),
        "{problem}"
    );
    assert!(
        problem.ends_with("the last good version stays in force"),
        "{problem}"
    );

    // Not YAML at all.
    write(&dir, "a.yaml", "kind: [Service\n");
    folder.reload();
    assert_eq!(port(&folder, "a"), Some(80));
    assert!(
        shown(&folder)[0].contains("a.yaml:"),
        "{:?}",
        shown(&folder)
    );

    // Moved to another file while broken.
    fs::remove_file(dir.path().join("r.yaml")).unwrap();
    write(&dir, "s.yaml", &route("one", "later"));
    folder.reload();
    assert_eq!(timeout(&folder, "one"), 1);
    assert!(
        folder
            .snapshot()
            .virtual_services
            .get("default", "two")
            .is_none()
    );

    // Mended: nothing is left of the problems.
    write(&dir, "s.yaml", &route("one", "5s"));
    write(&dir, "a.yaml", &service("a", 8080));
    folder.reload();
    assert_eq!(
        (timeout(&folder, "one"), port(&folder, "a")),
        (5, Some(8080))
    );
    assert_eq!(shown(&folder), [] as [String; 0]);
}

#[test]
fn a_second_object_of_one_name_is_refused_with_both_places() {
    let dir = TempDir::new().unwrap();
    write(&dir, "a.yaml", &service("a", 80));
    write(&dir, "b.yaml", &format!("\n\n{}", service("a", 81)));
    let folder = Folder::open(dir.path()).unwrap();
    assert_eq!(port(&folder, "a"), Some(80));
    let [problem] = &shown(&folder)[..] else {
        panic!("{:?}", shown(&folder))
    };
    assert!(problem.contains("b.yaml:3: Service default/a"), "{problem}");
    assert!(problem.contains("a.yaml:1"), "{problem}");
}

#[test]
fn an_emptied_file_is_given_time_for_its_new_content() {
    let dir = TempDir::new().unwrap();
    write(&dir, "a.yaml", &service("a", 80));
    let mut folder = Folder::open(dir.path()).unwrap();
    write(&dir, "a.yaml", "");
    let reloaded = folder.reload();
    assert!(reloaded.update.is_none() && reloaded.again.is_some());
    assert_eq!(port(&folder, "a"), Some(80));
    // Emptied and left so: the objects are gone in the end.
    while folder.reload().again.is_some() {}
    assert_eq!(port(&folder, "a"), None);
}

#[test]
fn mesh_config_comes_from_its_config_map_and_a_bad_one_changes_nothing() {
    let dir = TempDir::new().unwrap();
    let map = |mesh: &str| {
        format!(
            "apiVersion: v1\nkind: ConfigMap\nmetadata: {{name: istio, namespace: istio-system}}\ndata:\n  mesh: |\n    {mesh}\n"
        )
    };
    write(&dir, "m.yaml", &map("accessLogFile: /dev/stdout"));
    let mut folder = Folder::open(dir.path()).unwrap();
    assert_eq!(folder.snapshot().mesh.access_log_file, "/dev/stdout");
    assert_eq!(folder.snapshot().mesh.proxy_listen_port, 15001);
    for bad in ["accessLogFile: [", "proxyListenPort: many"] {
        write(&dir, "m.yaml", &map(bad));
        folder.reload();
        assert_eq!(
            folder.snapshot().mesh.access_log_file,
            "/dev/stdout",
            "{bad}"
        );
        assert!(
            shown(&folder)[0].contains("data.mesh"),
            "{:?}",
            shown(&folder)
        );
    }
    write(&dir, "m.yaml", &map("accessLogFile: /tmp/x"));
    let update = folder.reload().update.unwrap();
    assert!(
        update
            .changed
            .contains(&ObjectKey::new(Kind::ConfigMap, "istio-system", "istio"))
    );
    assert_eq!(folder.snapshot().mesh.access_log_file, "/tmp/x");
}

#[test]
fn endpoint_slices_follow_pods_until_somebody_writes_them() {
    let dir = TempDir::new().unwrap();
    write(
        &dir,
        "s.yaml",
        "apiVersion: v1\nkind: Service\nmetadata: {name: a}\nspec: {clusterIP: 10.0.0.9, selector: {app: a}, ports: [{name: http, port: 80, targetPort: web}]}\n",
    );
    let pod = |ready: &str| {
        format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: a-1, labels: {{app: a}}}}\nspec: {{containers: [{{name: a, ports: [{{name: web, containerPort: 8080}}]}}]}}\nstatus: {{phase: Running, podIP: 10.1.0.1, conditions: [{{type: Ready, status: '{ready}'}}]}}\n"
        )
    };
    write(&dir, "p.yaml", &pod("True"));
    let mut folder = Folder::open(dir.path()).unwrap();
    let slice = |f: &Folder| f.snapshot().endpoint_slices.iter().next().cloned();
    let one = slice(&folder).unwrap();
    assert_eq!(one.spec.ports[0].port, Some(8080));
    assert_eq!(one.spec.endpoints[0].addresses, ["10.1.0.1"]);
    assert_eq!(one.spec.endpoints[0].conditions.ready, Some(true));
    write(&dir, "p.yaml", &pod("False"));
    let update = folder.reload().update.unwrap();
    assert!(update.changed.iter().any(|k| k.kind == Kind::EndpointSlice));
    assert_eq!(
        slice(&folder).unwrap().spec.endpoints[0].conditions.ready,
        Some(false)
    );
    write(
        &dir,
        "e.yaml",
        "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {name: mine, labels: {kubernetes.io/service-name: a}}\naddressType: IPv4\n",
    );
    folder.reload();
    assert_eq!(slice(&folder).unwrap().meta.name, "mine");
    assert_eq!(folder.snapshot().endpoint_slices.len(), 1);
}

#[test]
fn a_link_swapped_like_a_mounted_config_map_is_one_change() {
    let dir = TempDir::new().unwrap();
    write(&dir, "..v1/a.yaml", &service("a", 80));
    write(&dir, "..v2/a.yaml", &service("a", 81));
    symlink("..v1", dir.path().join("..data")).unwrap();
    symlink("..data/a.yaml", dir.path().join("a.yaml")).unwrap();
    let mut folder = Folder::open(dir.path()).unwrap();
    assert_eq!(port(&folder, "a"), Some(80));
    symlink("..v2", dir.path().join("..data_tmp")).unwrap();
    fs::rename(dir.path().join("..data_tmp"), dir.path().join("..data")).unwrap();
    assert_eq!(folder.reload().update.unwrap().changed.len(), 1);
    assert_eq!(port(&folder, "a"), Some(81));
}

#[tokio::test]
async fn a_watch_tells_of_changes() {
    let dir = TempDir::new().unwrap();
    write(&dir, "a.yaml", &service("a", 80));
    let mut watch = Folder::open(dir.path()).unwrap().watch().unwrap();
    for number in [81, 82, 83] {
        let temporary = dir.path().join("next");
        fs::write(&temporary, service("a", number)).unwrap();
        fs::rename(&temporary, dir.path().join("a.yaml")).unwrap();
        let update = tokio::time::timeout(Duration::from_secs(20), watch.next())
            .await
            .unwrap()
            .unwrap();
        assert_eq!(update.changed.len(), 1);
        assert_eq!(
            update
                .snapshot
                .services
                .get("default", "a")
                .unwrap()
                .spec
                .spec
                .ports[0]
                .port,
            number
        );
    }
    write(&dir, "new/b.yaml", &service("b", 1));
    let update = tokio::time::timeout(Duration::from_secs(20), watch.next())
        .await
        .unwrap()
        .unwrap();
    assert!(update.snapshot.services.get("default", "b").is_some());
}
