-- One user with its state.
--   $1  user id  uuid
select users.id, users.created_at, users.login, users.project_id, users.env, users.domain, users.labels,
    lock_states.state, lock_states.holder, lock_states.fence, lock_states.acquired_at, lock_states.expires_at,
    lock_states.quarantine, lock_states.ready_at, lock_states.note,
    coalesce(lock_states.session_until > statement_timestamp(), false) as has_session,
    (select sealed from user_codes where user_codes.user_id = users.id) is not null as has_totp
from users
join lock_states on lock_states.user_id = users.id
where users.id = $1::uuid
