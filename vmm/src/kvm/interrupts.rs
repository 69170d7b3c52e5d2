//! Which message each interrupt line becomes: with a split irqchip the kernel
//! knows no I/O APIC, only a table of lines and messages.

use std::io;

use kvm_bindings::{KVM_IRQ_ROUTING_MSI, KvmIrqRouting, kvm_irq_routing_entry};
use thiserror::Error;
use vmm_devices::MsiRoute;

use super::Vm;

/// A table that KVM does not take.
#[derive(Debug, Error)]
pub enum RouteError {
    /// More lines than fit.
    #[error("{routes} interrupt routes do not fit KVM's table")]
    TooMany {
        /// How many.
        routes: usize,
    },
    /// `KVM_SET_GSI_ROUTING`.
    #[error("KVM does not take the interrupt routes")]
    Set(#[source] io::Error),
}

/// The VM's whole table.
pub struct Routes(Vm);

impl Routes {
    /// The table of this VM.
    pub fn new(vm: Vm) -> Self {
        Self(vm)
    }

    /// Replaces the table. Lines that are not in it go nowhere.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn replace(&self, routes: &[MsiRoute]) -> Result<(), RouteError> {
        let entries: Vec<_> = routes.iter().map(entry).collect();
        let table = KvmIrqRouting::from_entries(&entries).map_err(|_| RouteError::TooMany {
            routes: routes.len(),
        })?;
        self.0
            .fd
            .set_gsi_routing(&table)
            .map_err(|errno| RouteError::Set(errno.into()))
    }
}

fn entry(route: &MsiRoute) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry {
        gsi: route.pin,
        type_: KVM_IRQ_ROUTING_MSI,
        ..Default::default()
    };
    entry.u.msi.address_lo = route.address_low;
    entry.u.msi.address_hi = route.address_high;
    entry.u.msi.data = route.data;
    entry
}
