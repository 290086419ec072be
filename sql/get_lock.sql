-- A lock that is held, by its id.
--   $1  lock id  uuid
select locks.user_id, locks.fence, locks.lock_id, locks.acquired_at, locks.expires_at, locks.ttl, locks.holder,
    users.login, users.project_id, users.env, users.domain, users.labels
from locks
join users on users.id = locks.user_id
where locks.lock_id = $1::uuid
    and locks.expires_at > clock_timestamp()
