"""`routes` as Ray Serve asks for it; it runs beside each handle, in the loop of Serve's router."""

from __future__ import annotations

from collections import Counter
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from flextron.replicas.routes import Routes, State, Wanted

__all__ = ["Router"]


class Router(RequestRouter):  # type: ignore[misc]
    """Ranks replicas by what they hold and by the requests that they have not answered."""

    def initialize_state(self, **kwargs: Any) -> None:
        """Begin with nothing known."""
        self._routes, self._open = Routes(), Counter[str]()

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """All replicas, each a rank of its own."""
        wanted = Wanted()
        if pending_request is not None:
            # else Serve would ask again at once, without end
            pending_request.routing_context.should_backoff = True
            wanted = next((a.wanted for a in pending_request.args if hasattr(a, "wanted")), wanted)
        known = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        states = {r: self._state(r, replica.routing_stats) for r, replica in known.items()}
        return [[known[r]] for r in self._routes.order(wanted, states)] if states else []

    def _state(self, replica: str, told: dict[str, Any]) -> State:
        return State(
            # others may send requests, too, of which a replica tells from time to time
            load=max(self._open[replica], told.get("load", 0)),
            adapters=frozenset(told.get("adapters", ())),
            owns_jobs=bool(told.get("owns_jobs")),
        )

    def on_send_request(self, replica_id: ReplicaID) -> None:
        """One more."""
        super().on_send_request(replica_id)
        self._open[replica_id.unique_id] += 1

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """One less, however it ended."""
        super().on_request_completed(replica_id, internal_request_id)
        if self._open[replica_id.unique_id] > 1:
            self._open[replica_id.unique_id] -= 1
        else:
            # also of a replica that is gone
            del self._open[replica_id.unique_id]
