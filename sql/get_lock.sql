-- A lock that is held, by its id.
--   $1  lock id  uuid
--   $2  client   uuid: whose lock it has to be; null: anybody's
select locks.user_id, locks.fence, locks.lock_id, locks.acquired_at, locks.expires_at, locks.ttl, locks.holder,
    locks.note, users.login, users.project_id, users.env, users.domain, users.labels
from locks
join users on users.id = locks.user_id
where locks.lock_id = $1::uuid
    and ($2::uuid is null or locks.client_id = $2::uuid)
    and locks.expires_at > clock_timestamp()
