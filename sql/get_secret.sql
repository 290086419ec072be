-- What is stored of a user's password, to verify one.
--   $1  user id  uuid
select secret
from users
where id = $1::uuid
