//! `deploy/`: the manifests are valid Kubernetes, fit each other and the program's own settings, and the policies allow
//! exactly what the program calls.
//!
//! Kubernetes' own schemas come as a Python package, which also reads the YAML. Without it, and without a package index
//! to get it from, the tests of manifests are skipped and say so.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use local_stack::Virtualenv;
use serde_json::Value;
use write_api::config::{Config, Section};

const SCHEMAS: &str = "kubernetes-validate==1.37.0";
/// The oldest version that is still cared for somewhere, and the newest of the package.
const KUBERNETES: &str = "1.29,1.37";

/// Prints the documents of the files as JSON, and fails on those that Kubernetes would refuse.
const READ: &str = r#"
import json, sys, yaml, kubernetes_validate
documents, wrong = {}, []
for path in sys.argv[2:]:
    documents[path] = list(yaml.safe_load_all(open(path)))
    for document in documents[path]:
        # The kinds of kustomize and KEDA are not Kubernetes' own.
        if any(group in document["apiVersion"] for group in ("kustomize", "keda")):
            continue
        for version in sys.argv[1].split(","):
            try:
                kubernetes_validate.validate(document, version, strict=True)
            except Exception as error:
                wrong.append(f"{path}, Kubernetes {version}: {error}")
print(json.dumps(documents))
sys.exit("\n".join(wrong) or 0)
"#;

/// What the operator makes, because it is secret or differs from place to place.
const MADE_ELSEWHERE: [(&str, &str); 2] = [("Secret", "write-api"), ("ConfigMap", "write-api-authorities")];

fn deploy() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy")
}

fn files(folder: &Path, extension: &str) -> Result<BTreeSet<PathBuf>> {
    let mut found = BTreeSet::new();
    for entry in fs::read_dir(folder).with_context(|| folder.display().to_string())? {
        let path = entry?.path();
        if path.is_dir() {
            found.extend(files(&path, extension)?);
        } else if path.extension().is_some_and(|other| other == extension) {
            found.insert(path);
        }
    }
    Ok(found)
}

/// All manifests by file, checked against Kubernetes' schemas; `None` if that cannot be done here.
async fn manifests() -> Result<Option<BTreeMap<PathBuf, Vec<Value>>>> {
    let environment = match Virtualenv::with(SCHEMAS).await {
        Ok(environment) => environment,
        Err(error) => {
            eprintln!("skipped: {error:#}");
            return Ok(None);
        }
    };
    let mut python = Command::new(environment.python());
    python.args(["-c", READ, KUBERNETES]).args(files(&deploy(), "yaml")?);
    let output = python.output()?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Ok(Some(serde_json::from_slice(&output.stdout)?))
}

/// The documents of a kind.
fn of_kind<'a>(manifests: &'a BTreeMap<PathBuf, Vec<Value>>, kind: &str) -> Vec<&'a Value> {
    manifests.values().flatten().filter(|document| document["kind"] == kind).collect()
}

fn name(document: &Value) -> &str {
    document["metadata"]["name"].as_str().unwrap_or_default()
}

fn list(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

/// The text at a place of a document.
fn at<'a>(document: &'a Value, pointer: &str) -> Result<&'a str> {
    document.pointer(pointer).and_then(Value::as_str).with_context(|| format!("no text at {pointer} of {document}"))
}

fn number(document: &Value, pointer: &str) -> Result<u64> {
    document.pointer(pointer).and_then(Value::as_u64).with_context(|| format!("no number at {pointer} of {document}"))
}

/// The settings of the manifests as the program reads them, with stand-ins for the files that the pods will have.
fn settings() -> Result<(String, Config)> {
    let text = fs::read_to_string(deploy().join("kubernetes/settings/write-api.toml"))?;
    let directory = tempfile::tempdir()?;
    let here = directory.path().display().to_string();
    for path in paths(&text) {
        let file = PathBuf::from(path.replacen("/etc/write-api", &here, 1));
        fs::create_dir_all(file.parent().context("a folder")?)?;
        fs::write(file, "postgres://write-api@db.example/write_api?sslmode=verify-full")?;
    }
    let file = directory.path().join("write-api.toml");
    fs::write(&file, text.replace("/etc/write-api", &here))?;
    let needs = [Section::Database, Section::Partner, Section::Kafka];
    let config = Config::load(Some(&file), std::iter::empty(), &needs);
    let config = config.map_err(|errors| anyhow::anyhow!("{errors:#?}"))?;
    Ok((text, config))
}

/// The files that the settings name.
fn paths(settings: &str) -> Vec<&str> {
    let lines = settings.lines().filter(|line| !line.trim_start().starts_with('#'));
    lines.flat_map(|line| line.split('"')).filter(|word| word.starts_with("/etc/write-api/")).collect()
}

#[tokio::test]
async fn the_manifests_are_valid_and_each_is_listed() -> Result<()> {
    let Some(manifests) = manifests().await? else { return Ok(()) };
    ensure!(of_kind(&manifests, "Secret").is_empty(), "a secret lies in the repository");
    let mut listed = BTreeSet::new();
    for (path, documents) in &manifests {
        let folder = path.parent().context("a folder")?;
        for document in documents.iter().filter(|d| at(d, "/apiVersion").is_ok_and(|v| v.starts_with("kustomize"))) {
            listed.insert(path.clone());
            let generated = list(&document["configMapGenerator"]).flat_map(|generator| list(&generator["files"]));
            for entry in list(&document["resources"]).chain(list(&document["components"])).chain(generated) {
                let target = folder.join(entry.as_str().context("a path")?);
                let target = target.canonicalize().with_context(|| format!("{} names {entry}", path.display()))?;
                listed.insert(target);
            }
        }
    }
    let forgotten: Vec<_> = manifests.keys().filter(|path| !listed.contains(*path)).collect();
    ensure!(forgotten.is_empty(), "in no kustomization: {forgotten:?}");
    Ok(())
}

#[tokio::test]
async fn names_labels_ports_and_mounts_fit_each_other_and_the_settings() -> Result<()> {
    let Some(manifests) = manifests().await? else { return Ok(()) };
    let (text, config) = settings()?;
    let generated = of_kind(&manifests, "Component").into_iter().flat_map(|c| list(&c["configMapGenerator"]));
    let mut known: BTreeSet<(&str, &str)> =
        generated.filter_map(|generator| Some(("ConfigMap", generator["name"].as_str()?))).collect();
    known.extend(MADE_ELSEWHERE);
    known.extend(of_kind(&manifests, "ServiceAccount").into_iter().map(|account| ("ServiceAccount", name(account))));

    let workloads = [of_kind(&manifests, "Deployment"), of_kind(&manifests, "Job")].concat();
    ensure!(workloads.len() == 2, "{} workloads", workloads.len());
    for workload in workloads {
        let pod = &workload["spec"]["template"]["spec"];
        let mut used = vec![("ServiceAccount", at(pod, "/serviceAccountName")?)];
        for volume in list(&pod["volumes"]) {
            used.extend(volume.pointer("/configMap/name").and_then(Value::as_str).map(|name| ("ConfigMap", name)));
            used.extend(volume.pointer("/secret/secretName").and_then(Value::as_str).map(|name| ("Secret", name)));
        }
        for reference in &used {
            ensure!(known.contains(reference), "{} refers to {reference:?}, and there is {known:?}", name(workload));
        }
        for container in list(&pod["containers"]) {
            let mounts: Vec<&str> =
                list(&container["volumeMounts"]).filter_map(|mount| mount["mountPath"].as_str()).collect();
            for mount in list(&container["volumeMounts"]) {
                ensure!(list(&pod["volumes"]).any(|volume| volume["name"] == mount["name"]), "no volume for {mount}");
            }
            let config_file = list(&container["env"]).find(|variable| variable["name"] == "WRITE_API_CONFIG");
            let config_file = at(config_file.context("no WRITE_API_CONFIG")?, "/value")?;
            for path in paths(&text).into_iter().chain([config_file]) {
                ensure!(
                    mounts.iter().any(|mount| Path::new(path).starts_with(mount)),
                    "{path} is not below {mounts:?}"
                );
            }
        }
    }

    let deployment = of_kind(&manifests, "Deployment")[0];
    let pod = &deployment["spec"]["template"];
    let labels = &pod["metadata"]["labels"];
    let selects = |selector: &Value| {
        let wanted = selector["matchLabels"].as_object();
        wanted.is_some_and(|wanted| !wanted.is_empty() && wanted.iter().all(|(key, value)| labels[key] == *value))
    };
    let budget = of_kind(&manifests, "PodDisruptionBudget")[0];
    let policy = of_kind(&manifests, "NetworkPolicy")[0];
    let spread = list(&pod["spec"]["topologySpreadConstraints"]).map(|constraint| &constraint["labelSelector"]);
    for selector in [&deployment["spec"]["selector"], &budget["spec"]["selector"], &policy["spec"]["podSelector"]]
        .into_iter()
        .chain(spread)
    {
        ensure!(selects(selector), "{selector} does not select {labels}");
    }

    let container = &pod["spec"]["containers"][0];
    let port = u64::from(config.admin.listen.port());
    ensure!(!config.admin.listen.ip().is_loopback(), "probes come from outside of the pod");
    ensure!(
        number(container, "/ports/0/containerPort")? == port && number(policy, "/spec/ingress/0/ports/0/port")? == port
    );
    ensure!(at(&pod["metadata"], "/annotations/prometheus.io~1port")? == port.to_string());
    for (probe, path) in [("livenessProbe", "/livez"), ("readinessProbe", "/readyz")] {
        ensure!(at(&container[probe], "/httpGet/path")? == path, "{probe}: {}", container[probe]);
        ensure!(container[probe]["httpGet"]["port"] == container["ports"][0]["name"], "{probe}: {}", container[probe]);
    }
    let snapshots = &config.profiling.snapshots;
    let directory = snapshots.directory.as_ref().context("heap snapshots go nowhere")?.display().to_string();
    let mount = list(&container["volumeMounts"]).find(|mount| mount["mountPath"] == directory);
    let mount = mount.with_context(|| format!("nothing is mounted at {directory}"))?;
    ensure!(mount["readOnly"] != true, "{mount}");
    let volume = list(&pod["spec"]["volumes"]).find(|volume| volume["name"] == mount["name"]).context("no volume")?;
    let limit = at(volume, "/emptyDir/sizeLimit")?;
    let limit_mib: u64 = limit.strip_suffix("Mi").context(limit.to_owned())?.parse()?;
    ensure!(limit_mib << 20 > snapshots.budget_bytes, "{limit} is no room for {} bytes", snapshots.budget_bytes);
    let patience = number(&pod["spec"], "/terminationGracePeriodSeconds")?;
    ensure!(patience >= config.shutdown.grace.as_secs() + 5, "{patience} s for a grace of {:?}", config.shutdown.grace);
    Ok(())
}

#[tokio::test]
async fn every_container_has_no_rights_and_a_bound_on_its_memory() -> Result<()> {
    let Some(manifests) = manifests().await? else { return Ok(()) };
    for workload in [of_kind(&manifests, "Deployment"), of_kind(&manifests, "Job")].concat() {
        let pod = &workload["spec"]["template"]["spec"];
        ensure!(pod["securityContext"]["runAsNonRoot"] == true, "{}", name(workload));
        ensure!(pod["automountServiceAccountToken"] == false, "{}", name(workload));
        ensure!(pod["securityContext"]["seccompProfile"]["type"] == "RuntimeDefault", "{}", name(workload));
        for container in list(&pod["containers"]) {
            let context = &container["securityContext"];
            ensure!(context["readOnlyRootFilesystem"] == true && context["allowPrivilegeEscalation"] == false);
            ensure!(context["capabilities"]["drop"] == serde_json::json!(["ALL"]), "{context}");
            at(container, "/resources/limits/memory")?;
            at(container, "/resources/requests/cpu")?;
        }
    }
    Ok(())
}

/// KEDA's schema is not in the package: what it demands of these two kinds, by hand.
#[tokio::test]
async fn the_scaling_follows_every_lane_and_never_exceeds_what_the_partner_allows() -> Result<()> {
    let Some(manifests) = manifests().await? else { return Ok(()) };
    let (_, config) = settings()?;
    let [scaled] = of_kind(&manifests, "ScaledObject")[..] else { bail!("one ScaledObject") };
    let [authentication] = of_kind(&manifests, "TriggerAuthentication")[..] else { bail!("one TriggerAuthentication") };
    ensure!(at(authentication, "/spec/podIdentity/provider")? == "aws");
    let deployment = of_kind(&manifests, "Deployment")[0];
    ensure!(at(scaled, "/spec/scaleTargetRef/name")? == name(deployment));
    ensure!(deployment["spec"].get("replicas").is_none(), "two would decide on the number of pods");
    let (least, most) = (number(scaled, "/spec/minReplicaCount")?, number(scaled, "/spec/maxReplicaCount")?);
    ensure!(2 <= least && least <= most, "{least} to {most} pods");
    ensure!(number(deployment, "/spec/strategy/rollingUpdate/maxSurge")? == 0, "more pods than {most}");
    // What the partner allows is what one process takes by default.
    let allowed = Config::load(None, std::iter::empty(), &[]).map_err(|errors| anyhow::anyhow!("{errors:?}"))?.partner;
    ensure!(config.partner.in_flight as u64 * most <= allowed.in_flight as u64, "{most} pods: calls in flight");
    let rate = |partner: &write_api::config::Partner| u64::from(partner.rate_per_second.unwrap_or(u32::MAX));
    ensure!(rate(&config.partner) * most <= rate(&allowed), "{most} pods: calls a second");

    let mut queues = BTreeSet::new();
    for trigger in list(&scaled["spec"]["triggers"]) {
        ensure!(at(trigger, "/type")? == "aws-sqs-queue", "{trigger}");
        ensure!(at(trigger, "/authenticationRef/name")? == name(authentication), "{trigger}");
        let metadata = trigger["metadata"].as_object().context("metadata")?;
        for (key, value) in metadata {
            let known =
                ["queueURL", "awsRegion", "queueLength", "activationQueueLength", "scaleOnInFlight", "scaleOnDelayed"];
            ensure!(known.contains(&key.as_str()) && value.is_string(), "{key} = {value}: KEDA takes known texts only");
        }
        let length: u64 = at(trigger, "/metadata/queueLength")?.parse()?;
        ensure!(length > 0 && at(trigger, "/metadata/scaleOnInFlight")? == "true", "{trigger}");
        ensure!(at(trigger, "/metadata/awsRegion")? == config.aws.region, "{trigger}");
        let url = at(trigger, "/metadata/queueURL")?;
        let prefix = format!("https://sqs.{}.amazonaws.com/", config.aws.region);
        let queue = url.strip_prefix(&prefix).and_then(|rest| rest.split_once('/')).context(url.to_owned())?.1;
        queues.insert(queue.to_owned());
    }
    let lanes = [&config.lanes.events, &config.lanes.valuations, &config.lanes.post_processing];
    ensure!(queues == lanes.map(|lane| lane.queue.clone()).into(), "{queues:?}");
    Ok(())
}

/// What kustomize makes of the folders, where it is installed.
#[test]
fn both_folders_can_be_built() -> Result<()> {
    for folder in ["service", "setup"] {
        let built = Command::new("kubectl").arg("kustomize").arg(deploy().join("kubernetes").join(folder)).output();
        let Ok(built) = built else {
            eprintln!("skipped: kubectl is not installed");
            return Ok(());
        };
        let text = String::from_utf8_lossy(&built.stdout);
        ensure!(built.status.success(), "{folder}: {}", String::from_utf8_lossy(&built.stderr));
        ensure!(text.contains("image: registry.example/write-api:"), "{folder}: the image was not replaced");
        ensure!(
            !text.contains("name: write-api-settings\n"),
            "{folder}: a reference to the settings without their hash"
        );
    }
    Ok(())
}

/// The one policy that is about S3.
const SNAPSHOTS: &str = "iam-snapshots.json";

#[test]
fn snapshots_may_be_written_below_one_prefix_and_nothing_else() -> Result<()> {
    let policy: Value = serde_json::from_slice(&fs::read(deploy().join("aws").join(SNAPSHOTS))?)?;
    let [statement] = &policy["Statement"].as_array().context("statements")?[..] else { bail!("{policy}") };
    ensure!(
        statement["Effect"] == "Allow" && statement["Action"] == serde_json::json!(["s3:PutObject"]),
        "{statement}"
    );
    let [resource] = &statement["Resource"].as_array().context("resources")?[..] else { bail!("{statement}") };
    let key = resource.as_str().and_then(|arn| arn.strip_prefix("arn:aws:s3:::")).context("not S3")?;
    let (bucket, prefix) = key.split_once('/').context("the whole bucket")?;
    ensure!(!bucket.contains('*') && prefix.strip_suffix("/*").is_some_and(|prefix| !prefix.is_empty()), "{key}");
    // What the service calls; the bucket's other calls are those of the verbs that read.
    let source = fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/src/profiling/snapshots/upload.rs"))?;
    let called: BTreeSet<&str> =
        source.split("self.bucket.").skip(1).filter_map(|rest| rest.split('(').next()).collect();
    ensure!(called == BTreeSet::from(["put"]), "{called:?}");
    Ok(())
}

/// Policy name to action to the queues that it is allowed on.
fn policies() -> Result<BTreeMap<String, BTreeMap<String, BTreeSet<String>>>> {
    let mut policies = BTreeMap::new();
    for path in files(&deploy().join("aws"), "json")? {
        if path.ends_with(SNAPSHOTS) {
            continue;
        }
        let policy: Value = serde_json::from_slice(&fs::read(&path)?).with_context(|| path.display().to_string())?;
        ensure!(policy["Version"] == "2012-10-17", "{}", path.display());
        let mut allowed: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
        for statement in list(&policy["Statement"]) {
            ensure!(statement["Effect"] == "Allow", "{statement}");
            for action in list(&statement["Action"]) {
                let action = action.as_str().and_then(|action| action.strip_prefix("sqs:")).context("an SQS action")?;
                for queue in list(&statement["Resource"]) {
                    let queue = queue.as_str().and_then(|arn| arn.strip_prefix("arn:aws:sqs:us-east-1:123456789012:"));
                    let queue = queue.with_context(|| format!("not one queue: {statement}"))?;
                    ensure!(!queue.contains('*'), "more than one queue: {statement}");
                    allowed.entry(action.to_owned()).or_default().insert(queue.to_owned());
                }
            }
        }
        let name = path.file_stem().and_then(|name| name.to_str()).context("a name")?;
        policies.insert(name.trim_start_matches("iam-").to_owned(), allowed);
    }
    Ok(policies)
}

/// The calls in the one file that makes them, by their names there and by the SDK's methods. IAM knows no batches.
fn called() -> Result<BTreeSet<String>> {
    let source = fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/src/queue/sqs.rs"))?;
    let code: String = source.split("#[cfg(test)]").next().unwrap_or_default().split_whitespace().collect();
    let identifier = |rest: &str| rest.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect::<String>();
    let after = |prefix: &'static str| code.split(prefix).skip(1).map(identifier);
    let named: BTreeSet<String> = after("letaction=\"").collect();
    let pascal =
        |method: String| -> String { method.split('_').map(|word| word[..1].to_uppercase() + &word[1..]).collect() };
    let methods: BTreeSet<String> = after("self.client.").map(pascal).collect();
    ensure!(named.len() >= 8 && named == methods, "named {named:?}, called {methods:?}");
    Ok(named.iter().map(|action| action.trim_end_matches("Batch").to_owned()).collect())
}

#[test]
fn the_policies_allow_what_is_called_and_nothing_else() -> Result<()> {
    let policies = policies()?;
    let names: Vec<&str> = policies.keys().map(String::as_str).collect();
    ensure!(names == ["keda", "operator", "producer", "service", "setup"], "{names:?}");
    let actions = |name: &str| policies[name].keys().cloned().collect::<BTreeSet<String>>();
    let called = called()?;
    ensure!(&actions("service") | &actions("setup") == called, "the code calls {called:?}, the policies {policies:#?}");
    // Only the setup creates, and looks at attributes for it.
    let for_setup = ["CreateQueue", "GetQueueAttributes"].map(str::to_owned).into();
    ensure!(&called - &actions("service") == for_setup, "{:?}", actions("service"));

    let config = Config::load(None, std::iter::empty(), &[]).map_err(|errors| anyhow::anyhow!("{errors:?}"))?;
    let lanes =
        [&config.lanes.events, &config.lanes.valuations, &config.lanes.post_processing].map(|l| l.queue.clone());
    let dead = lanes.clone().map(|lane| format!("{lane}-dlq"));
    let set = |queues: &[&[String]]| queues.concat().into_iter().collect::<BTreeSet<String>>();
    let all = set(&[&lanes, &dead]);
    for (policy, action, queues) in [
        ("service", "GetQueueUrl", &all),
        ("service", "ReceiveMessage", &set(&[&lanes])),
        ("service", "DeleteMessage", &set(&[&lanes])),
        ("service", "ChangeMessageVisibility", &set(&[&lanes])),
        // It forwards to the slow lanes and refuses to the dead-letter queues; events come from producers.
        ("service", "SendMessage", &set(&[&lanes[1..], &dead])),
        ("setup", "CreateQueue", &all),
        ("setup", "GetQueueUrl", &all),
        ("setup", "GetQueueAttributes", &all),
        // The repair verbs: what is done to dead letters is done to nothing else.
        ("operator", "GetQueueUrl", &all),
        ("operator", "GetQueueAttributes", &set(&[&dead])),
        ("operator", "ReceiveMessage", &set(&[&dead])),
        ("operator", "ChangeMessageVisibility", &set(&[&dead])),
        ("operator", "DeleteMessage", &set(&[&dead])),
        ("operator", "SendMessage", &set(&[&lanes])),
        ("producer", "GetQueueUrl", &set(&[&lanes[..1]])),
        ("producer", "SendMessage", &set(&[&lanes[..1]])),
        ("keda", "GetQueueAttributes", &set(&[&lanes])),
    ] {
        ensure!(
            policies[policy].get(action) == Some(queues),
            "{policy}: {action} on {:?}",
            policies[policy].get(action)
        );
    }
    let count: usize = policies.values().map(BTreeMap::len).sum();
    ensure!(count == 17, "{count} rights, and 17 were looked at");
    Ok(())
}
