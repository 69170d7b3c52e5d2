use std::convert::Infallible;

use super::*;

/// Answers every request with the same, and remembers it.
struct Fixed(Placed, Vec<(PathBuf, Wanted)>);

impl Fixed {
    fn new(below: &[PlacedBelow]) -> Self {
        let placed = Placed {
            path: "volumes/0".into(),
            read_only: false,
            below: below.to_vec(),
        };
        Self(placed, Vec::new())
    }
}

impl Volumes for Fixed {
    type Error = Infallible;

    fn add(&mut self, source: &Path, wanted: &Wanted) -> Result<Placed, Infallible> {
        self.1.push((source.to_owned(), wanted.clone()));
        Ok(self.0.clone())
    }
}

const CONTAINER: Container<'_> = Container {
    shm_source: None,
    id_maps: None,
};

fn bind(options: &[&str]) -> Value {
    json!({"destination": "/d", "type": "bind", "source": "/host/a", "options": options})
}

fn rewritten(mount: Value, volumes: &mut Fixed) -> Vec<Value> {
    let mut mounts = Vec::new();
    rewrite(mount, 0, CONTAINER, volumes, &mut mounts).expect("rewrites");
    mounts
}

fn below(at: &str, path: &str, is_mount: bool) -> PlacedBelow {
    PlacedBelow {
        at: at.into(),
        path: path.into(),
        read_only: false,
        is_mount,
    }
}

#[test]
fn rewrite_asks_for_the_access_that_the_options_say() {
    use Access::{ReadOnly, ReadOnlyThroughout, Writable};

    for (options, access, wanted) in [
        (&["rbind"][..], Writable, Below::Now),
        (&["bind", "ro", "rw"], Writable, Below::Nothing),
        (&["rbind", "rw", "ro"], ReadOnly, Below::Now),
        (&["rbind", "ro", "rro"], ReadOnlyThroughout, Below::Now),
        (
            &["rbind", "bind", "rro", "rw"],
            ReadOnlyThroughout,
            Below::Nothing,
        ),
        (&["rbind", "rrw", "ro"], Writable, Below::Now),
        (&["rslave", "rbind"], Writable, Below::Followed),
        (&["rbind", "rshared"], Writable, Below::Followed),
        (&["rbind", "rslave", "rprivate"], Writable, Below::Now),
    ] {
        let mut volumes = Fixed::new(&[]);
        rewritten(bind(options), &mut volumes);
        let wanted = Wanted::unmapped(access, wanted);
        assert_eq!(volumes.1, [("/host/a".into(), wanted)]);
    }
}

#[test]
fn rewrite_keeps_the_options_for_the_guest() {
    let options = ["rbind", "ro", "nosuid", "rro", "rprivate"];
    let mounts = rewritten(bind(&options), &mut Fixed::new(&[]));
    let wanted = json!({
        "destination": "/d", "type": "bind", "options": options,
        "source": "/run/bulkhead/share/volumes/0",
    });
    assert_eq!(mounts, [wanted]);
}

#[test]
fn rewrite_with_something_below_mounts_it_after() {
    let mut volumes = Fixed::new(&[
        below("a", "volumes/1", true),
        below("b/c", "volumes/2", false),
    ]);
    let options = ["rbind", "ro", "noexec", "rnosuid", "rslave"];
    let mounts = rewritten(bind(&options), &mut volumes);
    assert_eq!(mounts.len(), 3);
    assert_eq!(
        mounts[1],
        json!({
            "destination": "/d/a", "type": "bind", "options": ["bind", "rnosuid", "rslave"],
            "source": "/run/bulkhead/share/volumes/1",
        }),
        "a mount of its own"
    );
    assert_eq!(
        mounts[2],
        json!({
            "destination": "/d/b/c", "type": "bind",
            "options": ["bind", "ro", "noexec", "rnosuid", "rslave"],
            "source": "/run/bulkhead/share/volumes/2",
        }),
        "a part of the source"
    );
}

#[test]
fn rewrite_of_what_the_host_does_not_let_write_is_read_only() {
    let mut volumes = Fixed::new(&[below("a", "volumes/1", true)]);
    volumes.0.read_only = true;
    volumes.0.below[0].read_only = true;
    let mounts = rewritten(bind(&["rbind", "rw"]), &mut volumes);
    assert_eq!(mounts[0]["options"], json!(["rbind", "rw", "ro"]));
    assert_eq!(mounts[1]["options"], json!(["bind", "ro"]));
}

#[test]
fn sources_are_the_binds_but_the_pods_shm() {
    let mounts = json!([
        {"destination": "/proc", "type": "proc", "source": "proc"},
        {"destination": "/dev/shm", "type": "bind", "source": "/run/shm"},
        {"destination": "/a", "source": "/host/a", "options": ["bind"]},
        {"destination": "/b", "type": "bind", "source": "relative"},
        {"destination": "/b", "type": "bind"},
    ]);
    let shm = Path::new("/run/shm");
    assert_eq!(sources(&mounts, Some(shm)), [(2, "/host/a".into())]);
    assert_eq!(sources(&mounts, None).len(), 2);
    assert_eq!(sources(&json!("no list"), None), []);
}

#[test]
fn rewrite_with_mappings_has_the_host_map_the_ids() {
    let mapping = json!([{"containerID": 0, "hostID": 65536, "size": 65536}]);
    let container = IdMaps::of_options("0:1000:10", "0:1000:10").expect("maps");
    let container = Container {
        shm_source: None,
        id_maps: Some(&container),
    };
    let asked = |mount: Value| {
        let (mut volumes, mut mounts) = (Fixed::new(&[]), Vec::new());
        rewrite(mount, 0, container, &mut volumes, &mut mounts).expect("rewrites");
        let asked = volumes.1.remove(0).1.id_maps;
        (asked, mounts.remove(0))
    };
    let mut mount = bind(&["rbind", "ro"]);
    mount["uidMappings"] = mapping.clone();
    mount["gidMappings"] = mapping;
    let (mapped, guest) = asked(mount.clone());
    let own = IdMaps::of_options("0:65536:65536", "0:65536:65536").expect("maps");
    assert_eq!(
        mapped.map(|mapped| (mapped.maps, mapped.recursive)),
        Some((own, false))
    );
    assert_eq!(guest.get("uidMappings").or(guest.get("gidMappings")), None);

    let (mapped, guest) = asked(bind(&["rbind", "ridmap", "ro"]));
    assert!(
        mapped.is_some_and(|mapped| mapped.recursive && Some(&mapped.maps) == container.id_maps)
    );
    assert_eq!(guest["options"], json!(["rbind", "ro"]));

    // No map: the guest's to refuse.
    mount["uidMappings"] = json!([{"containerID": 0, "hostID": 0, "size": 0}]);
    let (mapped, guest) = asked(mount);
    assert!(mapped.is_none() && guest.get("uidMappings").is_some());
}
