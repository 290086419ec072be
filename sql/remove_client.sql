-- Remove a client. Its locks run on until they expire.
--   $1  name  text
delete from clients
where name = $1::text
returning id, name, scopes, projects
