"""What the store tells while a claim is under way: the answer may be older than the news. Pure."""

from flannelpy.model.lease import Lease, LeaseUpdate, Snapshot


class Meanwhile:
    """Follows one history: a listing begins anew, for revisions of another one cannot be compared."""

    def __init__(self) -> None:
        self._last: dict[str, Lease | int] = {}
        """Key -> the record, or the revision of its deletion; 0 = it cannot be read."""
        self._listed_at = 0

    def take_in(self, update: LeaseUpdate) -> None:
        """What the store says."""
        if isinstance(update, Snapshot):
            self._last = {lease.key: lease for lease in update.leases}
            self._last.update((key, 0) for key, _reason in update.unreadable)
            self._listed_at = update.revision
        else:
            self._last.update((lease.key, lease) for lease in update.put)
            self._last.update(dict.fromkeys(update.gone, update.revision))

    def is_lost(self, own: Lease) -> bool:
        """Whether our new record was deleted since."""
        last = self._last.get(own.key, self._listed_at)
        return isinstance(last, int) and last > own.revision

    def written_since(self, own: Lease) -> Lease | None:
        """Our new record as somebody else wrote it since."""
        last = self._last.get(own.key)
        return last if isinstance(last, Lease) and last.revision > own.revision else None
