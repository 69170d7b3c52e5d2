use super::*;
use crate::host::mounts::tests::{bind_mount, owner, private_mounts, tmpfs_at};
use crate::host::share::Share;

use Access::{ReadOnly, ReadOnlyThroughout, Writable};

/// Directories of the host, and a pod's volumes of them.
struct Scene {
    base: tempfile::TempDir,
    volumes: Volumes,
}

impl Scene {
    fn new() -> Option<Self> {
        let base = private_mounts()?;
        let share = Share::create(&base.path().join("share")).expect("creates");
        let volumes = Volumes::new(share.path());
        Some(Self { base, volumes })
    }

    fn at(&self, name: &str) -> PathBuf {
        self.base.path().join(name)
    }

    fn make(&self, name: &str) -> PathBuf {
        fs::create_dir_all(self.at(name)).expect("makes");
        self.at(name)
    }

    fn place(&mut self, name: &str, access: Access) -> Placed {
        let source = Source::open(&self.at(name)).expect("opens");
        self.volumes
            .place(&source, &Wanted::unmapped(access, Below::Now))
            .expect("places")
    }

    fn path(&mut self, name: &str, access: Access) -> String {
        let placed = self.place(name, access);
        assert_eq!(placed.below, []);
        placed.path.display().to_string()
    }

    fn write(&self, path: &Path) -> Result<(), io::ErrorKind> {
        let file = self.at("share").join(path).join("written");
        fs::write(file, "x").map_err(|error| error.kind())
    }
}

const REFUSED: Result<(), io::ErrorKind> = Err(io::ErrorKind::ReadOnlyFilesystem);

fn below(at: &str, path: &str, is_mount: bool) -> PlacedBelow {
    PlacedBelow {
        at: at.into(),
        path: path.into(),
        read_only: false,
        is_mount,
    }
}

#[test]
fn place_followed_with_ids_mapped_all_the_way_maps_what_is_below() {
    let Some(mut scene) = Scene::new() else {
        return;
    };
    let source = scene.make("volume");
    tmpfs_at(&scene.make("volume/now"));
    for (recursive, wanted) in [(true, 65536), (false, 0)] {
        let maps = if recursive {
            "0:65536:10"
        } else {
            "0:65536:11"
        };
        let wish = Wanted {
            id_maps: IdMaps::of_options(maps, maps).map(|maps| Mapping { maps, recursive }),
            ..Wanted::unmapped(Writable, Below::Followed)
        };
        let source = Source::open(&source).expect("opens");
        let placed = scene.volumes.place(&source, &wish).expect("places");
        let now = scene.at("share").join(placed.path).join("now");
        assert_eq!(owner(&now), (wanted, wanted));
    }
}

#[test]
fn place_with_mapped_ids_is_another_volume_than_without() {
    let Some(mut scene) = Scene::new() else {
        return;
    };
    let source = scene.make("volume");
    scene.make("volume/sub");
    let mut place = |path: &Path, maps: Option<&str>| {
        let id_maps = maps.map(|maps| Mapping {
            maps: IdMaps::of_options(maps, maps).expect("maps"),
            recursive: false,
        });
        let wanted = Wanted {
            id_maps,
            ..Wanted::unmapped(Writable, Below::Nothing)
        };
        let source = Source::open(path).expect("opens");
        scene.volumes.place(&source, &wanted).expect("places").path
    };
    let plain = place(&source, None);
    let mapped = place(&source, Some("0:65536:65536"));
    assert_ne!(plain, mapped);
    assert_eq!(place(&source, Some("0:65536:65536")), mapped);
    assert_ne!(place(&source, Some("0:100000:65536")), mapped);
    let sub = place(&source.join("sub"), Some("0:65536:65536"));
    assert_eq!(sub, mapped.join("sub"));
    let share = scene.at("share");
    let owner = |path: &Path| owner(&share.join(path));
    assert_eq!(owner(&plain), (0, 0));
    assert_eq!(owner(&mapped), (65536, 65536));
}

#[test]
fn place_by_any_name_mount_and_access_is_one_volume() {
    let Some(mut scene) = Scene::new() else {
        return;
    };
    scene.make("volume/sub");
    std::os::unix::fs::symlink("volume", scene.at("link")).expect("links");
    fs::write(scene.at("volume/sub/file"), "content").expect("writes");
    bind_mount(&scene.at("volume"), &scene.make("again"));
    bind_mount(&scene.at("volume/sub"), &scene.make("subpath"));

    let first = scene.path("volume", Writable);
    assert_eq!(scene.path("link", ReadOnly), first);
    assert_eq!(scene.path("again", ReadOnlyThroughout), first);
    assert_eq!(scene.path("subpath", Writable), format!("{first}/sub"));
    assert_eq!(
        scene.path("volume/sub/file", ReadOnly),
        format!("{first}/sub/file")
    );
    assert_eq!(
        fs::read_dir(scene.at("share/volumes"))
            .expect("lists")
            .count(),
        1
    );
    let content = fs::read(scene.at("share").join(first).join("sub/file"));
    assert_eq!(content.expect("reads"), b"content");
}

#[test]
fn place_read_only_is_read_only_on_the_host_until_one_may_write() {
    let Some(mut scene) = Scene::new() else {
        return;
    };
    scene.make("volume");
    let path = PathBuf::from(scene.path("volume", ReadOnly));
    assert_eq!(scene.write(&path), REFUSED);
    let busy = fs::File::open(scene.at("share").join(&path)).expect("opens");
    assert_eq!(scene.path("volume", Writable), path.display().to_string());
    assert_eq!(scene.write(&path), Ok(()));
    assert_eq!(scene.path("volume", ReadOnly), path.display().to_string());
    assert_eq!(scene.write(&path), Ok(()), "others may still write");
    drop(busy);
}

#[test]
fn place_writable_inside_a_read_only_volume_leaves_the_rest_read_only() {
    let Some(mut scene) = Scene::new() else {
        return;
    };
    scene.make("volume/sub");
    let whole = PathBuf::from(scene.path("volume", ReadOnly));
    let sub = PathBuf::from(scene.path("volume/sub", Writable));
    assert_eq!(scene.write(&sub), Ok(()));
    assert_eq!(scene.write(&whole), REFUSED);
    assert_eq!(scene.write(&whole.join("sub")), REFUSED);
    // Who comes later sees the directory as the others do.
    let placed = scene.place("volume", ReadOnly);
    assert_eq!(placed.path, whole);
    assert_eq!(placed.below, [below("sub", "volumes/1", false)]);
}

#[test]
fn place_around_a_volume_has_it_mounted_over_in_the_guest() {
    let Some(mut scene) = Scene::new() else {
        return;
    };
    scene.make("volume/a/b");
    let inner = PathBuf::from(scene.path("volume/a/b", ReadOnly));
    let placed = scene.place("volume", Writable);
    assert_eq!(placed.path, Path::new("volumes/1"));
    assert_eq!(placed.below, [below("a/b", "volumes/0", false)]);
    assert_eq!(
        scene.write(&inner),
        Ok(()),
        "it is part of what may be written"
    );
    // The innermost counts.
    assert_eq!(scene.path("volume/a/b", Writable), "volumes/0");
    assert_eq!(
        scene.place("volume/a", Writable).below,
        [below("b", "volumes/0", false)]
    );
}

#[test]
fn place_with_mounts_below_makes_each_a_volume() {
    let Some(mut scene) = Scene::new() else {
        return;
    };
    tmpfs_at(&scene.make("volume/a"));
    tmpfs_at(&scene.make("volume/a/b"));
    let placed = scene.place("volume", ReadOnly);
    let both = [
        below("a", "volumes/1", true),
        below("a/b", "volumes/2", true),
    ];
    assert_eq!(placed.below, both);
    let write = |scene: &Scene, path: &str| scene.write(Path::new(path));
    assert_eq!(write(&scene, "volumes/0"), REFUSED);
    assert_eq!(
        write(&scene, "volumes/1"),
        Ok(()),
        "only the source is read-only"
    );
    assert!(
        !scene.at("share/volumes/0/a/b").exists(),
        "is not recursive"
    );
    assert_eq!(scene.path("volume/a/b", ReadOnlyThroughout), "volumes/2");

    let source = Source::open(&scene.at("volume")).expect("opens");
    let alone = scene
        .volumes
        .place(&source, &Wanted::unmapped(ReadOnly, Below::Nothing))
        .expect("places");
    assert_eq!(alone.below, []);
}

#[test]
fn place_throughout_read_only_denies_what_is_mounted_below() {
    let Some(mut scene) = Scene::new() else {
        return;
    };
    tmpfs_at(&scene.make("volume/a"));
    scene.place("volume", ReadOnlyThroughout);
    assert_eq!(scene.write(Path::new("volumes/1")), REFUSED);
}

#[test]
fn place_by_a_read_only_mount_of_the_host_tells_the_guest() {
    let Some(mut scene) = Scene::new() else {
        return;
    };
    scene.make("volume");
    let read_only = scene.make("read-only");
    bind_mount(&scene.at("volume"), &read_only);
    rustix::mount::mount_remount(
        &read_only,
        rustix::mount::MountFlags::BIND | rustix::mount::MountFlags::RDONLY,
        "",
    )
    .expect("remounts");
    let placed = scene.place("read-only", Writable);
    assert!(placed.read_only);
    assert_eq!(scene.write(&placed.path), REFUSED);
    let writable = scene.place("volume", Writable);
    assert_eq!((&writable.path, writable.read_only), (&placed.path, false));
    assert_eq!(scene.write(&placed.path), Ok(()));
}

#[test]
fn place_of_what_was_made_anew_is_another_volume() {
    let Some(mut scene) = Scene::new() else {
        return;
    };
    let volume = scene.make("volume");
    assert_eq!(scene.path("volume", Writable), "volumes/0");
    // So that the new one cannot get the old one's number.
    fs::rename(&volume, scene.at("old")).expect("renames");
    fs::create_dir(&volume).expect("makes");
    assert_eq!(scene.path("volume", Writable), "volumes/1");
    assert_eq!(scene.path("volume", ReadOnly), "volumes/1");
}

#[test]
fn place_through_a_link_that_the_guest_could_make_is_not_taken() {
    let Some(mut scene) = Scene::new() else {
        return;
    };
    scene.make("volume");
    scene.make("secret");
    assert_eq!(scene.path("volume", Writable), "volumes/0");
    std::os::unix::fs::symlink("../secret", scene.at("volume/link")).expect("links");
    // Opened by its name, a link leads where it leads on the host.
    assert_eq!(scene.path("volume/link", Writable), "volumes/1");
}

#[test]
fn place_of_a_remote_file_system_has_a_share_of_its_own_as_far_as_there_are_any() {
    let Some(mut scene) = Scene::new() else {
        return;
    };
    for number in 0..2 {
        let share = Share::create(&scene.at(&format!("remote-{number}"))).expect("creates");
        scene.volumes.add_share(share.path());
    }
    let mut place = |name: &str| {
        tmpfs_at(&scene.make(name));
        fs::create_dir(scene.at(name).join("sub")).expect("makes");
        let mut path = |name: &str| {
            let mut source = Source::open(&scene.at(name)).expect("opens");
            source.parts[0].is_remote = true;
            let placed = scene
                .volumes
                .place(&source, &Wanted::unmapped(Writable, Below::Now));
            placed.expect("places").path.display().to_string()
        };
        let whole = path(name);
        assert_eq!(path(name), whole);
        // Not by a look into the volume, for which its server would be asked.
        (whole, path(&format!("{name}/sub")))
    };
    let in_guest = |share: u32, number: u32| format!("{REMOTE_DIR}/{share}/volumes/{number}");
    assert_eq!(place("a"), (in_guest(0, 0), in_guest(0, 1)));
    assert_eq!(place("b"), (in_guest(1, 2), in_guest(1, 3)));
    assert_eq!(place("c"), (in_guest(1, 4), in_guest(1, 5)));
    assert!(scene.at("remote-0/volumes/0/sub").is_dir());
    assert_eq!(scene.path("share", Writable), "volumes/6");
}

#[test]
fn place_followed_has_the_mounts_that_the_host_has() {
    let Some(mut scene) = Scene::new() else {
        return;
    };
    scene.make("volume/early");
    scene.make("volume/late");
    tmpfs_at(&scene.at("volume/early"));
    fs::write(scene.at("volume/early/file"), "x").expect("writes");
    let source = Source::open(&scene.at("volume")).expect("opens");
    let placed = scene
        .volumes
        .place(&source, &Wanted::unmapped(Writable, Below::Followed));
    assert_eq!(placed.expect("places").below, []);
    let in_share = |scene: &Scene, name: &str| {
        let path = scene.at("share/volumes/0").join(name);
        fs::exists(path).expect("looks")
    };
    assert!(in_share(&scene, "early/file"));

    let update = |scene: &mut Scene| {
        for followee in scene.volumes.followees() {
            let news = source::news_of(&followee).expect("looks");
            scene.volumes.update(&followee, news);
        }
    };
    tmpfs_at(&scene.at("volume/late"));
    fs::create_dir(scene.at("volume/late/inner")).expect("makes");
    tmpfs_at(&scene.at("volume/late/inner"));
    fs::write(scene.at("volume/late/inner/file"), "x").expect("writes");
    assert!(!in_share(&scene, "late/inner"));
    update(&mut scene);
    assert!(in_share(&scene, "late/inner/file"));
    assert!(in_share(&scene, "early/file"));

    mounts::unmount_all(&scene.at("volume/late/inner")).expect("unmounts");
    mounts::unmount_all(&scene.at("volume/early")).expect("unmounts");
    update(&mut scene);
    assert!(in_share(&scene, "late/inner"));
    assert!(!in_share(&scene, "late/inner/file"));
    assert!(!in_share(&scene, "early/file"));
    mounts::unmount_all(&scene.at("volume/late")).expect("unmounts");
    update(&mut scene);
    assert!(!in_share(&scene, "late/inner"));
}

#[test]
fn place_followed_that_becomes_writable_has_writable_mounts() {
    let Some(mut scene) = Scene::new() else {
        return;
    };
    scene.make("volume/below");
    tmpfs_at(&scene.at("volume/below"));
    for (access, written) in [(ReadOnly, REFUSED), (Writable, Ok(()))] {
        let source = Source::open(&scene.at("volume")).expect("opens");
        let placed = scene
            .volumes
            .place(&source, &Wanted::unmapped(access, Below::Followed));
        assert_eq!(placed.expect("places").path, Path::new("volumes/0"));
        assert_eq!(scene.write(Path::new("volumes/0/below")), written);
    }
}

#[test]
fn place_followed_another_mount_of_the_same_identity_takes_its_place() {
    let Some(mut scene) = Scene::new() else {
        return;
    };
    scene.make("volume/below");
    tmpfs_at(&scene.at("volume/below"));
    fs::write(scene.at("volume/below/old"), "x").expect("writes");
    let source = Source::open(&scene.at("volume")).expect("opens");
    let placed = scene
        .volumes
        .place(&source, &Wanted::unmapped(Writable, Below::Followed));
    placed.expect("places");
    // The kernel gives an identity that is free to the next mount.
    mounts::unmount_all(&scene.at("volume/below")).expect("unmounts");
    tmpfs_at(&scene.at("volume/below"));
    fs::write(scene.at("volume/below/new"), "x").expect("writes");
    let followee = scene.volumes.followees().remove(0);
    let news = source::news_of(&followee).expect("looks");
    scene.volumes.update(&followee, news);
    let below = scene.at("share/volumes/0/below");
    assert!(below.join("new").exists() && !below.join("old").exists());
}

#[test]
fn place_followed_within_another_volume_or_of_a_share_is_not_followed() {
    let Some(mut scene) = Scene::new() else {
        return;
    };
    scene.make("volume/sub/below");
    tmpfs_at(&scene.at("volume/sub/below"));
    scene.place("volume", Writable);
    let source = Source::open(&scene.at("volume/sub")).expect("opens");
    let placed = scene
        .volumes
        .place(&source, &Wanted::unmapped(Writable, Below::Followed));
    // Its name may change under our hands: what is there now comes as ever.
    assert_eq!(placed.expect("places").below.len(), 1);
    assert_eq!(scene.volumes.followees().len(), 0);

    // All of the host, with the share in it.
    let source = Source::open(scene.base.path()).expect("opens");
    let placed = scene
        .volumes
        .place(&source, &Wanted::unmapped(Writable, Below::Followed));
    placed.expect("places");
    let followee = scene.volumes.followees().remove(0);
    assert!(
        followee
            .known
            .values()
            .all(|mounted| !mounted.at.starts_with("share"))
    );
    let news = source::news_of(&followee).expect("looks");
    assert_eq!(news.newcomers.len(), 0);
    assert_eq!(news.present.len(), followee.known.len());
}

#[test]
fn place_followed_a_link_of_the_guests_leads_nowhere() {
    let Some(mut scene) = Scene::new() else {
        return;
    };
    scene.make("volume/a/late");
    scene.make("victim/late");
    let source = Source::open(&scene.at("volume")).expect("opens");
    let placed = scene
        .volumes
        .place(&source, &Wanted::unmapped(Writable, Below::Followed));
    placed.expect("places");
    tmpfs_at(&scene.at("volume/a/late"));
    fs::write(scene.at("volume/a/late/file"), "x").expect("writes");
    let followee = scene.volumes.followees().remove(0);
    let news = source::news_of(&followee).expect("looks");
    assert_eq!(news.newcomers.len(), 1);
    // Between the look and the deed.
    let in_share = scene.at("share/volumes/0");
    fs::rename(in_share.join("a"), in_share.join("b")).expect("renames");
    std::os::unix::fs::symlink(scene.at("victim"), in_share.join("a")).expect("links");
    scene.volumes.update(&followee, news);
    assert!(!scene.at("victim/late/file").exists());
}
