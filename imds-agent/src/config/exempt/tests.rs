use super::*;
use crate::{config::Config, provider::Dmi};

fn resolve(text: &str) -> Result<Vec<Exempt>, String> {
    let config = Config::parse(text, Path::new("imds.toml"));
    let resolved = config.and_then(|config| config.resolve(&Dmi::default()));
    resolved.map(|(_, exempt)| exempt).map_err(|error| error.to_string())
}

fn one(lines: &str) -> Exempt {
    resolve(&format!("[[exempt]]\nname = 'a'\n{lines}")).unwrap().remove(0)
}

#[test]
fn each_way_to_say_who() {
    assert!(resolve("").unwrap().is_empty());
    let Sender::Interface(glob) = one("interface = 'veth[0-3]'").sender else { panic!("an interface") };
    assert!(glob.matches("veth3") && !glob.matches("veth4"));
    assert_eq!(one("netns = '/run/netns/x'").sender, Sender::Netns("/run/netns/x".into()));
    assert_eq!(one("cgroup = 'system.slice/x'").sender, Sender::Cgroup("system.slice/x".into()));
    let rule = one("netns = '/n'");
    assert_eq!((rule.scope, rule.is_audited), (Scope::All, false));
    let rule = one("netns = '/n'\nendpoints = ['imds']\naudit = true");
    let imds = Scope::Some(["169.254.169.254".parse().unwrap()].into());
    assert_eq!((rule.scope, rule.is_audited), (imds, true));
}

#[test]
fn rules_that_make_no_sense_are_named() {
    let rule = |lines: &str| format!("[[exempt]]\nname = 'a'\n{lines}");
    let two = |first: &str, second: &str| format!("{}\n[[exempt]]\nname = 'b'\n{second}", rule(first));
    for (text, place, part) in [
        ("[[exempt]]\nnetns = '/n'".to_owned(), "1:1", "name"),
        ("[[exempt]]\nname = ''\nnetns = '/n'".to_owned(), "2:8", "exempt.name"),
        (rule("netns = '/n'\n[[exempt]]\nname = 'a'\nnetns = '/m'"), "5:8", "already"),
        (rule("netns = '/n'\npod = 'x'"), "4:1", "pod"),
        (rule(""), "2:8", "says not whom"),
        (rule("netns = '/n'\ncgroup = 'c'"), "2:8", "only one"),
        (rule("interface = 'veth['"), "3:13", "veth["),
        (rule("interface = ''"), "3:13", "empty"),
        (rule("netns = 'n'"), "3:9", "absolute"),
        (rule("netns = '/run/../n'"), "3:9", ".."),
        (rule("cgroup = '/'"), "3:10", "names nothing"),
        (rule("cgroup = '.'"), "3:10", "`.`"),
        (rule("cgroup = ''"), "3:10", "names nothing"),
        (rule("netns = '/n'\nendpoints = []"), "4:13", "empty"),
        (rule("netns = '/n'\nendpoints = ['imds', 'imds']"), "4:22", "twice"),
        (rule("netns = '/n'\nendpoints = ['vault']"), "4:14", "\"vault\""),
        (rule("netns = '/n'\naudit = 'yes'"), "4:9", "yes"),
        (two("netns = '/n'\naudit = true", "netns = '/n'\nendpoints = ['imds']"), "6:8", "contradict"),
        (two("netns = '/n'", "netns = '/n'\nendpoints = ['imds']"), "5:8", "the same"),
    ] {
        let error = resolve(&text).unwrap_err();
        assert!(
            error.starts_with(&format!("imds.toml:{place}: ")) && error.contains(part),
            "{text}: {error}"
        );
    }
}

#[test]
fn rules_for_one_sender_need_not_contradict_each_other() {
    let own = "[[endpoint]]\nname = 'vault'\naddress = '10.0.0.9'\n";
    let rule =
        |name: &str, rest: &str| format!("[[exempt]]\nname = '{name}'\ncgroup = 'c'\nendpoints = ['{rest}\n");
    let text = format!("{own}{}{}", rule("a", "imds']"), rule("b", "vault']\naudit = true"));
    assert_eq!(resolve(&text).unwrap().len(), 2);
}
