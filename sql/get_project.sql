-- The project of a user, or of the user that a lock is or was on. Neither ever changes.
--   $1  user id  uuid or null
--   $2  lock id  uuid or null
select project_id
from users
where id = coalesce(
    $1::uuid,
    (select user_id from locks where lock_id = $2::uuid),
    (select user_id from history where lock_id = $2::uuid)
)
